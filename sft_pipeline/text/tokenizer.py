"""A tokenizer as its files define it: ids are those of tokenizer.json, and its vocabulary stays as it is."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import ID_FILES, TOKENIZER_FILES
from sft_pipeline.hub import local_folder
from sft_pipeline.store.files import sha256_file, sha256_json

NAMED_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Added tokens that look like this delimit turns even where tokenizer.json does not call them special.
MARKER = re.compile(
    r"<\|.*\|>|<｜.*｜>|\[/?[A-Z_]+\]|</?s>|<(?:start|end)_of_turn>|<(?:start|end)_of_\w+>"
    r"|<\w*(?:bos|eos|eot)\w*>"
)


@dataclass(frozen=True)
class Piece:
    """The ids of one stretch of text, and where its characters went.

    Attributes:
        text: The text that was encoded.
        ids: Token ids of `text` alone.
        encoding: May begin with tokens of a context, which `skip_tokens` and `skip_chars` leave out.
    """

    text: str
    ids: list[int]
    encoding: tokenizers.Encoding
    skip_tokens: int = 0
    skip_chars: int = 0

    def token_at(self, char: int) -> int | None:
        """Index of the token that covers a character of `text`; None where none does."""
        index = self.encoding.char_to_token(char + self.skip_chars)
        return None if index is None else index - self.skip_tokens


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer, its special tokens and its own chat templates.

    Attributes:
        source: Folder or hub id, as configured.
        folder: Where the files are.
        special: "bos_token" and so on -> the token's text, only those that the files name.
        templates: The tokenizer's own chat templates by name ("default" where there is one).
        added: Every added token's text -> id. These split the text before anything else.
        control: Those of them that ordinary text must never become.
        sha256: Fingerprint of the files that determine the ids.
        generation_eos: Ids at which generation_config.json ends a reply.
        adds_bos: Whether the tokenizer itself puts bos_token before a text.
    """

    source: str
    folder: Path
    backend: tokenizers.Tokenizer
    special: dict[str, str]
    templates: dict[str, str]
    added: dict[str, int]
    control: dict[str, int]
    sha256: str
    generation_eos: tuple[int, ...] = ()
    adds_bos: bool = False
    _contexts: dict[str, str | None] = field(default_factory=dict)

    # -- special tokens --------------------------------------------------------------------------------------

    def id_of(self, name: str) -> int | None:
        """The id of a named special token ("eos_token", ...), None where the tokenizer has none."""
        token = self.special.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added ones included."""
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def tokens(self) -> list[str | None]:
        """Id -> token, added ones included. None for an id without one."""
        size = self.backend.get_vocab_size(with_added_tokens=True)
        tokens = list(map(self.backend.id_to_token, range(size)))
        if None not in tokens:
            return tokens
        by_id = {i: token for token, i in self.vocabulary.items()}  # some id is higher than there are tokens
        return [by_id.get(i) for i in range(max(by_id) + 1)]

    @property
    def vocab_size(self) -> int:
        """The smallest vocabulary a model needs for every id of this tokenizer."""
        return len(self.tokens)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """The ids of the control tokens."""
        return frozenset(self.control.values())

    @property
    def needs_context(self) -> bool:
        """Whether text encodes differently at the beginning than after other text."""
        return any(self._contexts.values())

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds control tokens in text, the longest first, as the tokenizer does."""
        return any_of(self.control)

    # -- encoding --------------------------------------------------------------------------------------------

    def encode_batch(self, texts: Sequence[str]) -> list[Piece]:
        """Each text from its beginning, without the special tokens that a post-processor would add."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [Piece(t, e.ids, e) for t, e in zip(texts, encodings, strict=True)]

    def ids(self, text: str) -> list[int]:
        """Token ids of one text from its beginning."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def continue_batch(self, texts: Sequence[str], after: Sequence[int]) -> list[Piece]:
        """Each text as the continuation of something that ends in the token `after`.

        SentencePiece-style tokenizers put a space before a text's first word; within a sequence that space
        would be wrong. Such texts are encoded behind a short context, whose tokens are then left out.
        """
        contexts = [self._contexts["control" if token in self.control_ids else "text"] for token in after]
        if not any(contexts):
            return self.encode_batch(texts)
        pieces = self.encode_batch([(c or "") + t for c, t in zip(contexts, texts, strict=True)])
        out = []
        for piece, context, text in zip(pieces, contexts, texts, strict=True):
            known = self.ids(context) if context else []
            if piece.ids[: len(known)] == known:
                own, skipped = piece.ids[len(known) :], len(context or "")
                out.append(Piece(text, own, piece.encoding, len(known), skipped))
            else:  # the context merged with the text: encode it alone, and let the round trip judge
                out.append(self.encode_batch([text])[0])
        return out

    @lru_cache(maxsize=4096)  # noqa: B019 - a tokenizer lives as long as the process's work on it
    def tail_ids(self, control: str, tail: str) -> tuple[int, ...]:
        """Token ids of `tail` right after a control token."""
        return tuple(self.ids(control + tail)[1:])

    # -- decoding --------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Text of each sequence of ids, control tokens included; faster than one after the other."""
        return self.backend.decode_batch([list(s) for s in sequences], skip_special_tokens=False)


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the tokens, the longest first; one that finds nothing for no tokens."""
    ordered = sorted(tokens, key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def load_tokenizer(source: str, revision: str | None = None) -> Tokenizer:
    """Reads a tokenizer's files.

    Args:
        source: A folder (relative to the project root), or a hub id ("owner/name", also
            "owner/name@revision").
        revision: Commit of the hub repository; required for a hub id.

    Raises:
        InputError: The files are missing or unreadable; the message names them and the remedy.
    """
    folder = local_folder(source, revision, key="tokenizer", patterns=TOKENIZER_FILES)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"tokenizer {source}: {path} is missing; a fast tokenizer is needed "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for a file it cannot read
        raise InputError(f"{path}: not a readable tokenizer.json: {error}") from None
    settings = _read_json(folder / "tokenizer_config.json")
    names = {**_read_json(folder / "special_tokens_map.json"), **settings}
    return make_tokenizer(
        backend,
        source=source,
        folder=folder,
        special={k: v for k in NAMED_SPECIAL if (v := _token_text(names.get(k)))},
        templates=_own_templates(folder, settings),
        generation_eos=_eos_ids(_read_json(folder / "generation_config.json")),
        sha256=sha256_json([[n, sha256_file(folder / n)] for n in ID_FILES if (folder / n).is_file()]),
    )


def make_tokenizer(
    backend: tokenizers.Tokenizer,
    *,
    special: dict[str, str],
    templates: dict[str, str] | None = None,
    source: str = "in-process",
    folder: Path = Path(),
    generation_eos: tuple[int, ...] = (),
    sha256: str | None = None,
) -> Tokenizer:
    """A tokenizer around one of the `tokenizers` library, whose padding and truncation are switched off."""
    sha256 = sha256 or sha256_json(json.loads(backend.to_str()))
    backend.no_padding()
    backend.no_truncation()
    bos = special.get("bos_token")
    adds_bos = bos is not None and backend.encode("a").ids[:1] == [backend.token_to_id(bos)]
    # The ids stay the same (special tokens are never asked for), but offsets include white space again, which
    # the post-processors of GPT-2-like tokenizers trim away.
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    found = backend.get_added_tokens_decoder()
    added = {t.content: i for i, t in found.items()}
    control = {t.content: i for i, t in found.items() if t.special or MARKER.fullmatch(t.content)}
    # A named special token that tokenizer.json does not list as added cannot split text.
    control |= {token: added[token] for token in special.values() if token in added}
    plain = [
        t.content
        for t in found.values()
        if t.content in control and not (t.rstrip or t.lstrip or t.single_word or t.normalized)
    ]
    return Tokenizer(
        source,
        folder,
        backend,
        special,
        templates or {},
        added,
        control,
        sha256,
        generation_eos,
        adds_bos,
        {"control": _context(backend, plain[0]) if plain else None, "text": _context(backend, "\n")},
    )


def _context(backend: tokenizers.Tokenizer, context: str) -> str | None:
    """`context` if some text encodes differently after it than at the beginning; None: none is needed."""

    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    skip = len(ids(context))
    texts = ("Hello", " Hello", "1", "é", "-")
    return context if any(ids(context + t)[skip:] != ids(t) for t in texts) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object")
    return data


def _token_text(value: Any) -> str | None:
    """A special token is written as a string, or as a dict with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _eos_ids(generation: dict[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _own_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    value = settings.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return dict(value) if isinstance(value, dict) else {}
