"""First runs at the same moment, on an SFT_HOME that nobody has used."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sft_pipeline_tests.branches import LEARNS, SNAPSHOT
from sft_pipeline_tests.command import sft_process


@pytest.mark.parametrize("until", ["packed_shards", pytest.param("exported_model", marks=pytest.mark.slow)])
def test_three_first_runs_at_once(branch: Callable[..., Path], tmp_path: Path, until: str) -> None:
    """Two of one snapshot and one of another: all succeed, and what is equal is built once."""
    folder = branch(recipe=LEARNS)
    other = folder / "rows" / "2026-01-02"
    other.mkdir()
    (other / "rows.jsonl").write_bytes((folder / "rows" / SNAPSHOT / "rows.jsonl").read_bytes())
    home = tmp_path / "home"

    def run(snapshot: str):
        arguments = ("run", "small_lora", "--json", "--until", until, "--snapshot", snapshot)
        return sft_process(*arguments, home=home, config=folder)

    with ThreadPoolExecutor(3) as threads:
        ran = list(threads.map(run, [SNAPSHOT, SNAPSHOT, other.name]))
    assert [r.code for r in ran] == [0, 0, 0], [r.stderr[-2000:] for r in ran]
    first, second, third = (r.json["artifacts"] for r in ran)
    assert first == second and not set(first.values()) & set(third.values())
    assert len(list((home / "objects").iterdir())) == 2 * len(first)
