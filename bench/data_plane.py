"""Raw rows to packed shards, side by side: this pipeline, TRL's own preparation, and the bare tokenizer as the limit.

    python bench/data_plane.py                              a minute or two: 4,000 rows of two kinds
    python bench/data_plane.py --full --tokenizer FOLDER    the public sizes (an hour)
    python bench/data_plane.py --million                    one million rows: memory and speed
    python bench/data_plane.py --incremental 60000 120000   a new snapshot with 1 % of its rows edited

What is compared, and how it is kept fair:

- The same texts, as JSON Lines, each side in the shape it reads at once: text for the pipeline, lists of messages for
  TRL, so that neither converts. Both render the chat template, mask the prompt, and pack into blocks of 1,024
  tokens by best-fit-decreasing; what is longer is truncated. The pipeline also keeps provenance, judges rows, splits by
  group, proves masks, hashes and fsyncs; the peer does not.
- The near-duplicate search has no counterpart, so the pipeline runs with and without it, as two sides.
- TRL maps with as many processes as there are cores; its caches start empty. The bare side has all texts in memory and
  only encodes: no reading, no template, no mask, no output. It is a limit for the tokenizer of that library, not a peer.
- Each measurement is a fresh process with a fresh store, so nothing is warm but the page cache of the source, for all
  alike. Seconds are wall time of the work, which begins after the side's imports; what a stage imports only while it
  works (plots, the comparison with AutoTokenizer) counts, and so does loading the tokenizer (but for the bare side).
  "With imports" is the time since the process began.
- Sides take turns, every other round backwards, so that a machine whose speed drifts drifts for all. Seconds and ratios
  are medians over the rounds, ratios taken within a round; memory is the largest seen over the process tree.
- With the small vocabulary of the embedded base model, tokenizing costs other than with a real one: name a real
  tokenizer's folder for figures that mean something elsewhere.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from plane import incremental, rows, side_by_side
from plane.report import machine

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "data" / "base_model"
QUICK_SETS = ("gsm8k_like", "dolly")
QUICK_ROWS = 4_000
SETS = tuple(name for name in rows.DATA_SETS if name != "million")
ALL_SIDES = (*side_by_side.OURS, *side_by_side.PEERS)


def main() -> None:
    options = _options()
    tokenizer = str(Path(options.tokenizer).resolve())
    results: dict[str, Any] = {"machine": machine(), "tokenizer": Path(tokenizer).name}
    print("\n".join(f"{key}: {value}" for key, value in results["machine"].items()))
    print(f"tokenizer: {Path(tokenizer).name}" + _warning(tokenizer))
    if options.incremental:
        results["incremental"] = [
            _incremental(count, tokenizer, options.rounds) for count in options.incremental
        ]
    elif options.million:
        results["million"] = _million(options.million, tokenizer)
    else:
        results["side_by_side"] = {name: _compare(name, options, tokenizer) for name in options.sets}
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", default=EMBEDDED)
    parser.add_argument("--sets", nargs="+", choices=SETS, help="data sets to compare on")
    parser.add_argument("--full", action="store_true", help="all data sets, as large as the public ones")
    parser.add_argument(
        "--rows", type=int, default=QUICK_ROWS, help="at most this many rows each, unless --full"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--gsm8k", metavar="FILE", type=Path, help="real rows for gsm8k: JSON Lines with question and answer"
    )
    parser.add_argument(
        "--million",
        nargs="?",
        type=int,
        const=1_000_000,
        metavar="ROWS",
        help="this many rows, TRL on a tenth of them",
    )
    parser.add_argument(
        "--incremental", nargs="*", type=int, metavar="ROWS", help="rows of a snapshot (60000)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write every measurement here")
    options = parser.parse_args()
    options.sets = options.sets or (SETS if options.full else QUICK_SETS)
    if options.incremental == []:
        options.incremental = [60_000]
    return options


def _compare(name: str, options: argparse.Namespace, tokenizer: str) -> dict[str, Any]:
    """All sides on one data set."""
    wanted = rows.DATA_SETS[name].rows if options.full else min(options.rows, rows.DATA_SETS[name].rows)
    with tempfile.TemporaryDirectory() as folder:
        real = name == "gsm8k" and options.gsm8k
        source = rows.question_answer(options.gsm8k) if real else rows.synthetic(name, wanted)
        count = rows.write(source, Path(folder))
        _title(f"{name}: {count:,} {'real' if real else 'synthetic'} rows, median of {options.rounds} rounds")
        found = side_by_side.take_turns(Path(folder), tokenizer, ALL_SIDES, options.rounds)
    print(side_by_side.show(found, count), flush=True)
    return side_by_side.to_json(found)


def _million(count: int, tokenizer: str) -> dict[str, Any]:
    """The pipeline alone on many rows, and TRL on a tenth of them."""
    results = {}
    for rows_each, names in ((count, tuple(side_by_side.OURS)), (count // 10, ("TRL preparation",))):
        with tempfile.TemporaryDirectory() as folder:
            rows.write(rows.synthetic("million", rows_each), Path(folder))
            _title(f"{rows_each:,} synthetic rows of about 60 words")
            found = side_by_side.take_turns(Path(folder), tokenizer, names, rounds=1)
        print(side_by_side.show(found, rows_each), flush=True)
        results[str(rows_each)] = side_by_side.to_json(found)
    return results


def _incremental(count: int, tokenizer: str, rounds: int) -> dict[str, Any]:
    _title(
        f"snapshot B of {count:,} rows, of which {count // incremental.EDITED_EVERY:,} differ from A, median of {rounds} rounds"
    )
    found = incremental.run(count, tokenizer, rounds)
    print(incremental.show(found), flush=True)
    return found.to_json()


def _warning(tokenizer: str) -> str:
    return " (a small vocabulary: not representative, see --tokenizer)" if Path(tokenizer) == EMBEDDED else ""


def _title(text: str) -> None:
    print(f"\n### {text}\n", flush=True)


if __name__ == "__main__":
    main()
