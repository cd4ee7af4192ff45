"""Raw rows to packed shards: this pipeline, TRL's own preparation, and the bare tokenizer as the limit.

    python bench/data_plane.py                              a minute or two: 4,000 rows of two kinds
    python bench/data_plane.py --full --tokenizer FOLDER    the public sizes (an hour)
    python bench/data_plane.py --million                    one million rows: memory and speed
    python bench/data_plane.py --incremental 60000 120000   a new snapshot with 1 % of its rows edited
    python bench/data_plane.py --small                      60 rows: what a small build and a cached one cost

What is compared, and how it is kept fair:

- The same texts, as JSON Lines, for each system in the shape it reads at once: text for the pipeline,
  lists of messages for TRL, so that neither converts. Both render the chat template, mask the prompt, and
  pack into blocks of 1,024 tokens by best-fit-decreasing; what is longer is truncated. The pipeline also
  keeps provenance, judges rows, splits by group, proves masks, hashes and fsyncs; the peer does not.
- The near-duplicate search has no counterpart, so the pipeline runs with and without it, as two systems.
- TRL maps with as many processes as there are cores; its caches start empty. `encode_batch` has all texts
  in memory and only encodes: no reading, no template, no mask, no output. It is a limit for the tokenizer
  of that library, not a peer.
- Each measurement is a fresh process with a fresh store, so nothing is warm but the page cache of the
  source, for all alike. Seconds are wall time of the work, which begins after the system's imports; what
  a stage imports only while it works (plots, the comparison with AutoTokenizer) counts, and so does
  loading the tokenizer (but for `encode_batch`). "With imports" is the time since the process began.
- Systems take turns, every other round backwards, so that a machine whose speed drifts drifts for all.
  Seconds and ratios are medians over the rounds, with the least and the greatest; ratios are taken within
  a round. Memory is the largest seen over the process tree.
- With the small vocabulary of the embedded base model, tokenizing costs other than with a real one: name
  a real tokenizer's folder for figures that mean something elsewhere.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plane import compare, rows
from report import machine

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "data" / "base_model"
QUICK_SETS = ("gsm8k_like", "dolly")
QUICK_ROWS = 4_000
SETS = tuple(name for name in rows.DATA_SETS if name != "million")


def main() -> None:
    options = _options()
    tokenizer = str(Path(options.tokenizer).resolve())
    results: dict[str, Any] = {"machine": machine(), "tokenizer": Path(tokenizer).name}
    print("\n".join(f"{key}: {value}" for key, value in results["machine"].items()))
    warning = (
        " (a small vocabulary: not representative, see --tokenizer)" if Path(tokenizer) == EMBEDDED else ""
    )
    print(f"tokenizer: {Path(tokenizer).name}{warning}")
    if options.small:
        _title(f"{compare.SMALL_ROWS} rows, embedded base model, rounds: {options.rounds}")
        results["small"] = compare.measure_small(options.rounds)
        print(compare.show_small(results["small"]), flush=True)
    elif options.incremental:
        results["incremental"] = []
        for count in options.incremental:
            edited = len(range(0, count, compare.EDITED_EVERY))
            _title(
                f"snapshot B of {count:,} rows, {edited:,} of them edited since A, rounds: {options.rounds}"
            )
            found = compare.measure_incremental(count, tokenizer, options.rounds)
            print(compare.show_incremental(found), flush=True)
            results["incremental"].append(found.to_json())
    elif options.million:
        # TRL on a tenth of the rows: all of them would take it half an hour
        for count, names in (
            (options.million, (compare.OURS, compare.WITH_SEARCH)),
            (options.million // 10, (compare.TRL,)),
        ):
            source = rows.synthetic("million", count)
            results[f"{count} rows"] = _systems("million", "synthetic", source, names, tokenizer, rounds=1)
    else:
        for name in options.sets:
            real = name == "gsm8k" and options.gsm8k
            most = rows.DATA_SETS[name].rows
            wanted = most if options.full else min(options.rows, most)
            source = rows.question_answer(options.gsm8k) if real else rows.synthetic(name, wanted)
            kind = "real" if real else "synthetic"
            results[name] = _systems(name, kind, source, tuple(compare.SYSTEMS), tokenizer, options.rounds)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", metavar="FOLDER", default=EMBEDDED)
    add("--sets", nargs="+", choices=SETS, help="data sets to compare on")
    add("--full", action="store_true", help="all data sets, as large as the public ones")
    add("--rows", type=int, default=QUICK_ROWS, help="at most this many rows each, unless --full")
    add("--rounds", type=int, default=2)
    add("--gsm8k", metavar="FILE", type=Path, help="real rows for gsm8k: JSON Lines of question and answer")
    add(
        "--million",
        nargs="?",
        type=int,
        const=1_000_000,
        metavar="ROWS",
        help="so many, TRL on a tenth of them",
    )
    add("--incremental", nargs="*", type=int, metavar="ROWS", help="rows of a snapshot (60000)")
    add("--small", action="store_true", help="CPU seconds of 60 rows, wall seconds of a cached run")
    add("--json", metavar="FILE", help="also write every measurement here")
    options = parser.parse_args()
    options.sets = options.sets or (SETS if options.full else QUICK_SETS)
    if options.incremental == []:
        options.incremental = [60_000]
    return options


def _systems(
    name: str, kind: str, source: rows.Pairs, systems: tuple[str, ...], tokenizer: str, rounds: int
) -> dict[str, Any]:
    """Measures systems on the same rows, prints the table, and returns every single measurement."""
    with tempfile.TemporaryDirectory() as folder:
        count = rows.write(source, Path(folder))
        _title(f"{name}: {count:,} {kind} rows, rounds: {rounds}")
        found = compare.take_turns(Path(folder), tokenizer, systems, rounds)
    print(compare.show_systems(found, count), flush=True)
    return {system: [asdict(run) for run in runs] for system, runs in found.items()}


def _title(text: str) -> None:
    print(f"\n### {text}\n", flush=True)


if __name__ == "__main__":
    main()
