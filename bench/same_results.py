"""Whether two checkouts of this project make the same of the same rows, by content.

    python bench/same_results.py OLD_CHECKOUT       against the checkout that this file is in
    python bench/same_results.py OLD NEW --keep FOLDER --updates 40
                                                    builds the old one once; a short training

Each branch is built by `sft run` with the code of each checkout, in a fresh process and a fresh store: the
demo (`access_policy_lora` on its newest snapshot), and 5,000 rows each of gsm8k, banking77 and multidogo up
to packed_shards under real tokenizers, where the public data are there. The artifacts' files are read
directly, so that nothing of either checkout has a say in the comparison, and neither do the stores' hashes:
rows, splits, rejects and their reasons, ids, labels, packs, plan; of the demo the weights of every checkpoint
bit for bit, its curves, its scores, and what is exported.

Prints a table, the first difference of each kind, and which files have other bytes although their content is
the same. Exit code 1 where any content differs.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from report import machine, table
from results.build import READERS, Branch, branches, build, write_config
from results.compare import compare, other_files

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def main() -> int:
    options = _options()
    if not options.data.is_dir():
        print(f"{options.data} is not there: only the demo is compared (--data FOLDER)")
        options.sets = [name for name in options.sets if name == "demo"]
    wanted = branches(tuple(options.sets), options.until, options.updates)
    print("\n".join(f"{key}: {value}" for key, value in machine().items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="same-results-") as scratch:
        kept = options.keep.resolve() if options.keep else Path(scratch) / "old"
        write_config(kept / "config", options.data.resolve(), wanted)
        different = [_compare(branch, options, kept, Path(scratch) / "new") for branch in wanted]
    print(f"\n{sum(map(bool, different))} of {len(wanted)} branches differ")
    return int(any(different))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT", nargs="?", default=ROOT)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="builds of the old checkout stay here")
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=DATA, help="public data")
    parser.add_argument("--sets", nargs="+", choices=("demo", *READERS), default=["demo", *READERS])
    parser.add_argument("--until", metavar="ASSET", help="of the demo (all of it)")
    parser.add_argument("--updates", type=int, metavar="N", help="of the demo's training (all of the recipe)")
    parser.add_argument("--old-only", action="store_true", help="fill --keep and compare nothing")
    return parser.parse_args()


def _compare(branch: Branch, options: argparse.Namespace, kept: Path, fresh: Path) -> list[str]:
    """Builds one branch with both checkouts and prints what came of it; returns the differences."""
    old = build(branch, options.old.resolve(), kept / "config", kept / _commit(options.old))
    print(f"\n### {branch.folder}\n\nold: {old['status']}, {len(old['artifacts'])} artifacts", flush=True)
    if options.old_only:
        return []
    new = build(branch, options.new.resolve(), kept / "config", fresh)
    print(f"new: {new['status']}, {len(new['artifacts'])} artifacts\n")
    findings = compare(old, new)
    lines = [[f.what, f.old, f.new, "yes" if f.difference is None else "NO"] for f in findings]
    print(table(("", "old", "new", "equal"), lines) + "\n", flush=True)
    different = [f"{f.what}: {f.difference}" for f in findings if f.difference is not None]
    print("\n".join(f"- DIFFERENT {line}" for line in different))
    print("\n".join(f"- {line}" for line in other_files(old, new, findings)), flush=True)
    return different


def _commit(checkout: Path) -> str:
    """Names the folder of a checkout's builds, so that those of another commit are never taken for it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
