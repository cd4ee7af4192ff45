"""A disk that is full, at whatever stage: one message, no half artifact, and the next run goes on."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_pipeline_tests.branches import LEARNS
from sft_pipeline_tests.command import environment_of

# A small disk in a namespace of its own, which needs no root; then the same one with room.
SCRIPT = """
mount -t tmpfs -o size="$1" tmpfs "$SFT_HOME" || exit 77
shift
"$@" >/dev/null 2>"$LOG"
echo $? >"$LOG.code"
for folder in "$SFT_HOME"/objects/*/; do
    [ ! -d "$folder" ] || [ -f "$folder/manifest.json" ] || echo "half: $folder" >>"$LOG"
done
mount -o remount,size=500m "$SFT_HOME"
"$@"
"""


@pytest.mark.parametrize(
    ("size", "until"),
    [
        pytest.param("16k", "raw_rows", marks=pytest.mark.slow),  # for nothing but a folder
        ("200k", "raw_rows"),  # while Dagster sets up its databases
        ("900k", "packed_shards"),
        pytest.param("1500k", "packed_shards", marks=pytest.mark.slow),
        pytest.param("6m", "sanity_check", marks=pytest.mark.slow),
        pytest.param("12m", "exported_model", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk(branch: Callable[..., Path], tmp_path: Path, size: str, until: str) -> None:
    folder = branch(recipe=LEARNS)
    home, log = tmp_path / "home", tmp_path / "log"
    home.mkdir()
    main = "from sft_pipeline.cli.main import main; main()"
    sft = [sys.executable, "-c", main, "run", "small_lora", "--json", "--until", until]
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh", size, *sft],
        env=environment_of(home, folder, LOG=str(log)),
        capture_output=True,
        text=True,
    )
    if ran.returncode in (1, 77) and not log.exists():
        pytest.skip("this machine lets nobody mount a small disk")
    said = log.read_text()
    assert Path(f"{log}.code").read_text() == "2\n", said[-3000:]
    last = said.strip().splitlines()[-1]
    assert last.startswith("sft: ") and ("no space left" in last or "the disk is full" in last), said[-3000:]
    assert "Traceback" not in said and "half: " not in said
    assert ran.returncode == 0, ran.stderr[-3000:]  # with room
