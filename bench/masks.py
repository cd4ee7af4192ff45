"""Which tokens carry loss: beside TRL's own masks, on the same rows.

    python bench/masks.py [--seeds 1]        about a minute

Every chat template in TRL's package with a tokenizer that fits it, and rows of every shape (those of
bench/differential.py). TRL prepares each row by its own code: `completion_only_loss` on prompt and
completion, `assistant_only_loss` on messages, with its training template where it has one. Where ids or
labels differ, the served prompt decides: a supervised span is right if the ids before it are those that
`apply_chat_template(messages before the turn, add_generation_prompt=True)` gives, under the template that is
served, and if the span is what the template writes after that prompt, up to and with what ends the turn.

axolotl and LLaMA-Factory take part where the Python of an environment that has them is given:

    python bench/masks.py --axolotl /envs/axolotl/bin/python --llamafactory /envs/llamafactory/bin/python

They mask by code of their own (bench/peer_masks.py) and are compared with `supervise: assistant`;
LLaMA-Factory only where it has a template of that model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
warnings.filterwarnings("ignore")

from peer_masks import LLAMAFACTORY  # noqa: E402
from report import machine, table  # noqa: E402

from sft_pipeline_tests.differential.compare import WHITE_SPACE, Comparison, spans_of  # noqa: E402
from sft_pipeline_tests.differential.space import Pairing, rows, templates  # noqa: E402

MODES = {"completion_only_loss": "completion", "assistant_only_loss": "assistant"}  # TRL's, ours
PEERS = ("axolotl", "llamafactory")
TITLES = {mode: f"TRL {mode}" for mode in MODES}
Tokens = tuple[list[int], list[int]]  # input ids, labels
Row = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1, help="rows of each shape, template and peer")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"of an environment that has {peer}")
    options = parser.parse_args()
    print("\n".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    names = [n for n in templates() if not n.endswith("_training")]  # TRL chooses what it trains with
    given = [pair for seed in range(options.seeds) for pair in rows(seed)]
    only_rows = [row for _, row in given]
    judges = {mode: {name: MaskJudge(name, supervise) for name in names} for mode, supervise in MODES.items()}
    results: dict[str, dict[str, list[Tokens | str]]] = {
        mode: {name: [trl_tokens(judge.served, row, mode) for row in only_rows] for name, judge in of.items()}
        for mode, of in judges.items()
    }
    for peer in PEERS:
        if python := getattr(options, peer):
            judges[peer] = judges["assistant_only_loss"]
            results[peer] = peer_tokens(peer, python, judges[peer], only_rows)
    verdicts: dict[str, Counter[str]] = {mode: Counter() for mode in results}
    kinds: Counter[tuple[str, str, str]] = Counter()
    examples: dict[tuple[str, str, str], str] = {}
    for mode, of_templates in results.items():
        for name, theirs in of_templates.items():
            judge = judges[mode][name]
            for (shape, row), a, b in zip(given, judge.ours(only_rows), theirs, strict=True):
                verdict, problems = judge.verdict(row, a, b)
                verdicts[mode][verdict] += 1
                for whose, problem in problems:
                    key = (mode, whose, problem)
                    kinds[key] += 1
                    examples.setdefault(key, f"{name}, {shape}")
    counted = sorted({verdict for counts in verdicts.values() for verdict in counts})
    lines = [[v, *(f"{verdicts[mode][v]:,}" for mode in results)] for v in counted]
    print(table(["outcome", *(TITLES.get(mode, mode) for mode in results)], lines))
    lines = [[*key, f"{count:,}", examples[key]] for key, count in kinds.most_common()]
    print(table(["masks of", "whose", "what is wrong", "rows", "for example"], lines))
    # Why they refuse rows, in their words: an error of this benchmark would show here.
    refusals = Counter(
        (mode, found)
        for mode, of in results.items()
        for theirs in of.values()
        for found in theirs
        if isinstance(found, str)
    )
    print(table(["masks of", "refuses, since", "rows"], [[*k, f"{n:,}"] for k, n in refusals.most_common()]))
    return int(any(whose == "ours" for _, whose, _ in kinds))


def peer_tokens(
    peer: str, python: str, judges: Mapping[str, "MaskJudge"], given: Sequence[Row]
) -> dict[str, list[Tokens | str]]:
    """What another framework trains on, by template; asked in one process of its own environment."""
    names = [n for n in judges if peer != "llamafactory" or n in LLAMAFACTORY]
    with tempfile.TemporaryDirectory() as folder:
        requests = []
        for name in names:
            judges[name].served.save_pretrained(f"{folder}/{name}")
            requests.append({"template": name, "tokenizer": f"{folder}/{name}", "rows": given})
        script = [python, str(Path(__file__).with_name("peer_masks.py")), peer]
        done = subprocess.run(
            script, input=json.dumps(requests), stdout=subprocess.PIPE, text=True, check=True
        )
    replies = json.loads(done.stdout)
    return {
        name: [found if isinstance(found, str) else (found[0], found[1]) for found in of_template]
        for name, of_template in zip(names, replies, strict=True)
    }


def trl_tokens(served: Any, row: Mapping[str, Any], mode: str) -> Tokens | str:
    """What TRL trains on: ids and labels of a row, or why it refuses it."""
    import datasets
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import get_training_chat_template
    from trl.trainer import sft_trainer

    datasets.disable_progress_bars()
    sft_trainer.logger.setLevel("ERROR")
    messages = row["messages"]
    example = {k: json.dumps(v) if k == "tools" else v for k, v in row.items()}
    if mode == "completion_only_loss":
        example = {**example, "prompt": messages[:-1], "completion": messages[-1:]}
        del example["messages"]
    try:
        with_marks = mode == "assistant_only_loss" and "{% generation" not in served.chat_template
        trainer = SimpleNamespace(
            chat_template=get_training_chat_template(served) if with_marks else None,
            completion_only_loss=mode == "completion_only_loss",
            _tokenizer=served,
        )
        settings = {"max_length": None, "bf16": False, "use_cpu": True, "report_to": "none"}
        prepared = SFTTrainer._prepare_dataset(
            trainer,  # type: ignore[arg-type]  # it takes nothing else of the trainer
            datasets.Dataset.from_list([example]),
            served,
            SFTConfig(output_dir="unused", **{mode: True}, **settings),
            False,
            None,
            "train",
        )
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:60]
    found = prepared[0]
    return list(found["input_ids"]), list(found["labels"])


class MaskJudge:
    """One template and one way to supervise, and what is right under them."""

    def __init__(self, name: str, supervise: str) -> None:
        self._comparison = Comparison(Pairing(name), supervise)
        self.supervise, self.served = supervise, self._comparison.served

    def ours(self, given: Sequence[Mapping[str, Any]]) -> list[Tokens | str]:
        """Ids and labels of each row, or why it is refused."""
        return [
            found if isinstance(found, str) else (found.input_ids.tolist(), found.labels.tolist())
            for found in self._comparison.examples(given)
        ]

    def verdict(
        self, row: Mapping[str, Any], ours: Tokens | str, theirs: Tokens | str
    ) -> tuple[str, list[tuple[str, str]]]:
        """(in words, (whose, what is wrong) for each side that is wrong)"""
        if isinstance(ours, str) and isinstance(theirs, str):
            return "both refuse it", []
        problems = []
        right = {}
        for whose, found in (("ours", ours), ("theirs", theirs)):
            if isinstance(found, str):
                continue
            problem = self._problem(row, *found)
            right[whose] = problem is None
            if problem:
                problems.append((whose, problem))
        if isinstance(ours, str):
            good = "right" if right["theirs"] else "wrong"
            return f"refused here ({ours}); their spans are {good}", problems
        if isinstance(theirs, str):
            return f"they refuse it; ours is {'right' if right['ours'] else 'wrong'}", problems
        if problems == [("theirs", WHITE_SPACE)]:
            return "ours is right; theirs adds white space after the stop", problems
        if ours == theirs:
            return f"equal, {'right' if right['ours'] else 'wrong'}", problems
        if all(right.values()):
            more = len(spans_of(theirs[1])) - len(spans_of(ours[1]))
            return "both right" + (f", theirs has {more} more turns" if more > 0 else ""), problems
        return next((f"{whose} is right" for whose, good in right.items() if good), "neither"), problems

    def _problem(self, row: Mapping[str, Any], ids: list[int], labels: list[int]) -> str | None:
        """What is wrong with the supervised spans."""
        spans = spans_of(labels)
        if not spans:
            return "nothing is supervised"
        found = [self._comparison.problem_of_span(row, ids, begin, end) for begin, end in spans]
        return next((problem for problem in found if problem), None)


if __name__ == "__main__":
    sys.exit(main())
