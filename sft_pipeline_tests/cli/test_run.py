"""`sft run`: how many functions of the package lie between the command and the work."""

import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from sft_pipeline.project import PACKAGE_DIR
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.tokenized_rows import build as tokenized_rows
from sft_pipeline_tests.branches import write_branch
from sft_pipeline_tests.command import sft

MOST_TO_BUILD, MOST_TO_TOKENIZER = 7, 12


def own(frame: FrameType) -> list[str]:
    """The functions of this package on the stack, the outermost first."""
    return [f.name for f in traceback.extract_stack(frame) if f.filename.startswith(f"{PACKAGE_DIR}/")]


def test_the_way_to_a_build_and_to_the_tokenizer_is_short(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tokenized_rows.build
    to_build: list[str] = []
    to_tokenizer: list[list[str]] = []

    def watched(b: Build) -> Built:
        def watch(frame: FrameType, event: str, function: Any) -> None:
            if event == "call" and frame.f_code is build.__code__:
                to_build[:] = own(frame)
            elif event == "c_call" and function.__name__.startswith("encode_batch"):
                to_tokenizer.append(own(frame))

        sys.setprofile(watch)
        try:
            return build(b)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(tokenized_rows, "build", watched)
    config = write_branch(tmp_path / "config")
    command = ("run", "small_lora", "--until", "tokenized_rows", "--json")
    assert sft(*command, home=home, config=config, SFT_WORKERS="1").code == 0
    assert to_build[0] == "main" and len(to_build) <= MOST_TO_BUILD, to_build
    assert len(to_tokenizer[0]) <= MOST_TO_TOKENIZER, to_tokenizer[0]  # of the first rows' prompts
