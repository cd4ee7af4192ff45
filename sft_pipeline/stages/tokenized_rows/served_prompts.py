"""A sample of the rows, compared with what a server would make of the source rows.

The prompts of at least 300 rows, and of five rows of every shape (roles, fields present, tools), are made
again from the rows as they were written in the source file: rendered by the same template, and by
transformers' `apply_chat_template` with the tokenizer that would be exported, the clock standing still on
both sides. The ids must be those with which the training rows begin.
"""

import json
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tokenized_rows.batch_encoder import BatchEncoder, EncodedBatch
from sft_pipeline.stages.tokenized_rows.source_rows import (
    Place,
    ancestor,
    read_sources,
    shapes_of,
    source_conversation,
)
from sft_pipeline.stages.tokenized_rows.tokenizer_skew import (
    TokenizerSkew,
    known_skew,
    prompt_request,
    skew_of,
    skew_request,
)
from sft_pipeline.store import Artifact
from sft_pipeline.tables import literal_json
from sft_pipeline.tables.schemas import SHAPES_FILE as ROW_SHAPES
from sft_pipeline.text.auto_tokenizer import AutoTokenizerReply, AutoTokenizerRequest, ask_auto_tokenizer
from sft_pipeline.text.conversation import Conversation, conversation
from sft_pipeline.text.exported_tokenizer import write_tokenizer
from sft_pipeline.text.find_template import end_ids
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer

SAMPLE = 300
SAMPLE_OF_CHANGES = 50  # where an earlier build has compared so many, and most rows are taken from it
OF_EACH_SHAPE = 5
MOST = 2_000  # rows in the sample, however many shapes there are
SHAPES_FILE = "served_shapes.json"
SERVED_CHECK = "served_prompt_equal"


@dataclass(frozen=True)
class SampledRow:
    """A training row of the sample.

    Attributes:
        place: Source, file and line of the row.
        given: The conversation that was rendered.
        prompt: Ids with which the training row begins: all before the final turn.
        ids: All of its ids.
    """

    place: Place
    row_id: str
    shape: int
    given: Conversation
    prompt: list[int]
    ids: list[int]

    @property
    def key(self) -> tuple[Place, str]:
        return self.place, self.row_id


@dataclass
class ServedPrompts:
    """How the sampled prompts compare with those of the source rows and of a server.

    Attributes:
        tokenizer: As the recipe names it.
        sampled: Rows of the sample, rendered again.
        not_prefix: Of these, those that do not begin with the ids of their prompt.
        compared: Rows compared with their source.
        served: Of these, rows that transformers rendered too; the others are of shapes that an earlier build
            has compared.
        neutralised: Rows left out, since a server is sent their control tokens as they are.
        wrong: What differs, for people.
        lost: Texts of source rows that the training rows do not hold, for people.
        unavailable: Why there was nothing to compare with.
        shapes: Those that transformers has rendered without a difference, now and earlier.
    """

    tokenizer: str
    sampled: int = 0
    not_prefix: list[dict[str, Any]] = field(default_factory=list)
    compared: int = 0
    served: int = 0
    neutralised: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    unavailable: str = ""
    shapes: set[int] = field(default_factory=set)


class PromptSample:
    """The sampled rows, and what transformers makes of them.

    Args:
        split: grouped_split, whose ancestors hold the source rows.
        earlier: Builds with the same tokenizer, template and versions, which may have asked transformers.
    """

    def __init__(self, split: Artifact, earlier: Sequence[Artifact] = ()) -> None:
        self._split = split
        self._known_skew, self._known_shapes = known_skew(earlier), known_shapes(earlier)
        self._asked: list[tuple[list[SampledRow], Future[_Answers]]] = []
        self._size = SAMPLE_OF_CHANGES if self._known_shapes else SAMPLE
        self._seen: Counter[int] = Counter()
        self.rows: list[SampledRow] = []

    def add(self, encoder: BatchEncoder, rows: pa.RecordBatch, encoded: EncodedBatch) -> None:
        """Takes accepted, uncut rows of a batch: the first ones, and the first ones of each shape."""
        if not rows.num_rows or len(self.rows) >= MOST:
            return
        shapes = shapes_of(rows).tolist()
        # Twice as many as are wanted, since some may have been rejected or cut.
        counted = Counter({shape: 2 * count for shape, count in self._seen.items()})
        wanted: list[int] = []
        for i, shape in enumerate(shapes):
            if counted[shape] < 2 * OF_EACH_SHAPE or 2 * len(self.rows) + len(wanted) < 2 * self._size:
                counted[shape] += 1
                wanted.append(i)
        chosen = rows.take(pa.array(wanted, pa.int64())).to_pylist()
        ids = pa.array([row["row_id"] for row in chosen], pa.string())
        examples = encoded.examples.filter(pc.is_in(encoded.examples.column("row_id"), ids))
        by_id = {e["row_id"]: e for e in examples.to_pylist() if not e["truncated"]}
        reference = encoder.row_encoder
        for i, row in zip(wanted, chosen, strict=True):
            example, shape = by_id.get(row["row_id"]), shapes[i]
            if example is None or (self._seen[shape] >= OF_EACH_SHAPE and len(self.rows) >= self._size):
                continue
            given = reference.guard.check(conversation(row, reference.system))
            place = (row["source"], row["file"], row["line"])
            prompt = example["input_ids"][: example["prompt_length"]]
            self.rows.append(SampledRow(place, row["row_id"], shape, given, prompt, example["input_ids"]))
            self._seen[shape] += 1
        if len(self.rows) >= self._size and not self._asked:
            self._ask(encoder, self.rows)  # while the other rows are encoded

    def compare(self, encoder: BatchEncoder) -> tuple[ServedPrompts, TokenizerSkew]:
        """Compares the sample with the source rows and with transformers."""
        found = ServedPrompts(encoder.config.tokenizer, shapes=set(self._known_shapes))
        asked = sum(len(rows) for rows, _ in self._asked)
        if asked < len(self.rows) or not self._asked:
            self._ask(encoder, self.rows[asked:])
        skew = self._known_skew
        for rows, future in self._asked:
            answers = future.result()
            skew = skew or answers.skew
            _compare(encoder, rows, answers, found, self._known_shapes)
        return found, skew or TokenizerSkew(False, "no row to compare AutoTokenizer with")

    def close(self) -> None:
        """Waits for AutoTokenizer's process, where it was asked: it must not outlive a build that failed."""
        wait([future for _, future in self._asked])

    def _ask(self, encoder: BatchEncoder, rows: Sequence[SampledRow]) -> None:
        thread = ThreadPoolExecutor(1)  # it mostly waits for a process, two seconds beside the encoding
        first = not self._asked
        arguments = (encoder, self._split, list(rows), self._known_shapes, first and not self._known_skew)
        self._asked.append((list(rows), thread.submit(_ask_source_and_server, *arguments)))
        thread.shutdown(wait=False)


@dataclass(frozen=True)
class _Answers:
    """What source and server say of some sampled rows.

    Attributes:
        sources: By row id, (messages, tools) of the source row; None where the store has it no more.
        served: What the exported tokenizer gives for the prompts of `served_rows`.
    """

    sources: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] | None
    served_rows: list[tuple[Place, str]]
    served: AutoTokenizerReply | None
    skew: TokenizerSkew | None


def _ask_source_and_server(
    encoder: BatchEncoder, split: Artifact, rows: list[SampledRow], known: set[int], with_skew: bool
) -> _Answers:
    template, tokenizer = encoder.template, encoder.tokenizer
    sources = _sources(encoder, split, rows)
    new = [r for r in rows if r.shape not in known and not r.given.neutralised]
    requests: list[AutoTokenizerRequest] = []
    sample = [r.given for r in rows]
    if with_skew and sample:
        requests.append(skew_request(tokenizer, template, sample))
    with tempfile.TemporaryDirectory() as folder:
        if new:
            write_exported(tokenizer, template, Path(folder))
            prompts = []
            for r in new:
                messages, tools = (sources or {}).get(r.row_id, (r.given.messages, r.given.tools))
                prompts.append(prompt_request(template, template.as_read(messages[:-1]), tools))
            requests.append(AutoTokenizerRequest(folder, prompts=prompts))
        replies = ask_auto_tokenizer(requests) if requests else []
    skew = skew_of(tokenizer, template, sample, replies[0]) if with_skew and sample else None
    return _Answers(sources, [r.key for r in new], replies[-1] if new else None, skew)


def write_exported(tokenizer: Tokenizer, template: ChatTemplate, folder: Path) -> None:
    """The tokenizer as it would be exported, with the config.json beside it.

    AutoTokenizer forces the class of some architectures, whatever the tokenizer's own configuration says.
    """
    with_tools = template.tool_text if template.tool_text != template.text else None
    ends = end_ids(tokenizer, template)
    write_tokenizer(tokenizer, template.text, folder, pad_id=min(ends, default=0), with_tools=with_tools)
    if (config := tokenizer.folder / "config.json").is_file():
        shutil.copyfile(config, folder / "config.json")


def _sources(
    encoder: BatchEncoder, split: Artifact, rows: Sequence[SampledRow]
) -> dict[str, tuple[list[dict[str, Any]], list[Any] | None]] | None:
    try:
        validated = ancestor(split, "validated_rows")
        shapes = json.loads(validated.file(ROW_SHAPES).read_bytes())
        contract = validated.manifest.config["contract"]
        wanted = {r.row_id: r.place for r in rows}
        read = read_sources(ancestor(validated, "raw_rows"), shapes, wanted)
    except (KeyError, OSError):
        return None
    system = encoder.config.template.system
    found = {}
    for r in rows:
        if r.row_id not in read:
            continue
        roles = [m["role"] for m in r.given.messages]
        added = system is not None and r.given.messages[0] == {"role": "system", "content": system}
        messages, tools = source_conversation(
            read[r.row_id], shapes[r.place[0]], contract, roles[1:] if added else roles, encoder.template
        )
        if added and messages[:1] != r.given.messages[:1]:
            messages = [r.given.messages[0], *messages]
        found[r.row_id] = (messages, tools)
    return found


def _compare(
    encoder: BatchEncoder,
    rows: Sequence[SampledRow],
    answers: _Answers,
    found: ServedPrompts,
    known: set[int],
) -> None:
    """Adds to `found` what differs from the source rows, rendered here and by transformers."""
    template, tokenizer = encoder.template, encoder.tokenizer
    if answers.sources is None:
        found.unavailable = "the source rows are no longer in the store"
    served = {}
    if answers.served is not None and answers.served.unavailable:
        found.wrong.append({"row": "", "why": f"AutoTokenizer cannot load it: {answers.served.unavailable}"})
    elif answers.served is not None:
        served = dict(zip(answers.served_rows, answers.served.prompt_ids, strict=True))
    for r in rows:
        found.sampled += 1
        again = template.render(r.given.messages[:-1], r.given.tools, add_generation_prompt=True)
        if (ids := tokenizer.ids(again)) != r.prompt:
            found.not_prefix.append(
                {"row_id": r.row_id, "prompt_tokens": len(ids), "recorded": len(r.prompt)}
            )
        if r.given.neutralised:
            found.neutralised += 1
            continue
        where = f"{r.place[1]}:{r.place[2]}"
        messages, tools = r.given.messages, r.given.tools
        if answers.sources is not None:
            messages, tools = answers.sources.get(r.row_id, ([], None))
            found.compared += 1
            if len(messages) != len(r.given.messages):
                found.wrong.append({"row": where, "why": f"the source row has {len(messages)} messages"})
                continue
            ours = tokenizer.ids(template.render(messages[:-1], tools, add_generation_prompt=True))
            if ours != r.prompt:
                found.wrong.append(_difference(tokenizer, where, "the source row", r.prompt, ours))
                continue
            # The final turn is no part of the prompt: what is trained there is compared field by field.
            if lost := _lost(messages[-1], r.given.messages[-1], template):
                found.wrong.append(
                    {"row": where, "why": f"{lost} of the final message is not as in the source"}
                )
                continue
            decoded = _squeeze(tokenizer.decode(r.ids))
            ignored = encoder.config.template.ignore
            texts = [(f, t) for f, t in _said(messages, tools) if f not in ignored]
            found.lost += [{"row": where, "field": f} for f, t in texts if _squeeze(t) not in decoded]
        if r.key not in served:
            continue
        found.served += 1
        expected = r.prompt
        plain_messages, plain_tools = json.loads(json.dumps([messages, tools]))
        if _spelled(messages, tools):  # JSON readers make 1.5 of 1.50
            text = template.render(plain_messages[:-1], plain_tools, add_generation_prompt=True)
            expected = tokenizer.ids(text)
        if list(served[r.key]) != expected:
            found.wrong.append(_difference(tokenizer, where, "transformers", expected, served[r.key]))
        else:
            found.shapes.add(r.shape)


def _spelled(messages: Any, tools: Any) -> bool:
    """Whether some number is spelled as Python would not spell it."""
    return literal_json.dumps([messages, tools]) != json.dumps([messages, tools])


def _said(messages: Sequence[dict[str, Any]], tools: Sequence[Any] | None) -> Iterator[tuple[str, str]]:
    """(field, text) of what a training row must hold as it is. Earlier replies may be laid out anew."""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == len(messages) - 1:
            yield "content", message.get("content") or ""
        yield from (("tool_calls", call["function"]["name"]) for call in message.get("tool_calls") or ())
    yield from (("tools", str(tool["function"].get("name", ""))) for tool in tools or ())


def _squeeze(text: str) -> str:
    """The text in its canonical composition, which some tokenizers bring it into, without white space."""
    return "".join(unicodedata.normalize("NFC", text).split())


def _lost(source: dict[str, Any], ours: dict[str, Any], template: ChatTemplate) -> str | None:
    """The field in which the final message differs from the source row's."""
    source, ours = dict(template.as_read([source])[0]), dict(template.as_read([ours])[0])
    for name in ("content", template.reasoning_field, "tool_calls", "name"):
        a, b = source.get(name) or "", ours.get(name) or ""
        if (a.strip() if isinstance(a, str) else a) != (b.strip() if isinstance(b, str) else b):
            return name
    return None


def _difference(
    tokenizer: Tokenizer, where: str, other: str, ours: Sequence[int], theirs: Sequence[int]
) -> dict[str, Any]:
    unequal = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    at = next(unequal, min(len(ours), len(theirs)))
    window = slice(max(at - 8, 0), at + 12)
    return {
        "row": where,
        "why": f"at token {at}, training has {tokenizer.decode(ours[window])!r} and {other} gives "
        f"{tokenizer.decode(theirs[window])!r}",
    }


def known_shapes(earlier: Sequence[Artifact]) -> set[int]:
    """Shapes of which the newest of the earlier builds found transformers to give the same prompts."""
    for artifact in earlier[:1]:
        if (path := artifact.file(SHAPES_FILE)).is_file():
            return {int(shape, 16) for shape in json.loads(path.read_text(encoding="utf-8"))}
    return set()
