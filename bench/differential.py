"""Every row that is accepted against transformers, over many templates and shapes of rows.

    python bench/differential.py --seeds 7          about 21,000 rows, a minute
    python bench/differential.py --seeds 5 --tokenizers FOLDER

Each chat template in TRL's package, with a tokenizer made for it and with every real one in --tokenizers
that has its control tokens; the named templates and the tokenizers' own with every real one; and rows of
every shape with random contents, under three ways to supervise. What is compared is in
sft_pipeline_tests/differential: the ids of the prompt with those of `apply_chat_template` on the source row,
and each supervised span with what the template adds to the prompt that a server sends for that turn. Prints
what became of the rows; exit code 1 at any difference.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from report import machine, table  # noqa: E402

from sft_pipeline.errors import InputError  # noqa: E402
from sft_pipeline_tests.differential.compare import Comparison  # noqa: E402
from sft_pipeline_tests.differential.space import pairings, rows  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=7, help="rows of each shape, template and way to supervise"
    )
    parser.add_argument("--tokenizers", type=Path, help="a folder of tokenizer folders")
    options = parser.parse_args()
    print("\n".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    outcomes: Counter[str] = Counter()
    by_shape: dict[str, Counter[str]] = {}
    for pairing in pairings(options.tokenizers):
        for supervise in ("completion", "assistant", "last_turn"):
            given = [pair for seed in range(options.seeds) for pair in rows(seed)]
            try:
                found = Comparison(pairing, supervise).compare([row for _, row in given])
            except InputError as error:
                print(f"{pairing}: refused: {error}", flush=True)
                break
            for (shape, _), one in zip(given, found, strict=True):
                field = f": {one.detail}" if "field_not_rendered" in one.outcome else ""
                outcomes[one.outcome + field] += 1
                by_shape.setdefault(shape, Counter())[one.outcome.partition(":")[0]] += 1
                if one.outcome.startswith("different"):
                    print(f"{pairing}, {supervise}, {shape}: {one.outcome}\n{one.detail}", flush=True)
    total = sum(outcomes.values())
    lines = [[name, f"{count:,}", f"{count / total:.1%}"] for name, count in outcomes.most_common()]
    print(table(["outcome", "rows", "share"], [*lines, ["all", f"{total:,}", ""]]))
    kinds = ("equal", "refused", "different")
    print(table(["shape", *kinds], [[s, *(f"{c[k]:,}" for k in kinds)] for s, c in by_shape.items()]))
    return int(any(name.startswith("different") for name in outcomes))


if __name__ == "__main__":
    sys.exit(main())
