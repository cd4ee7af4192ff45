"""Branches on small datasets of the test's own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sft_pipeline_tests.branches import write_branch


@pytest.fixture
def branch(tmp_path: Path) -> Callable[..., Path]:
    """`write_branch` into the test's folder."""
    return partial(write_branch, tmp_path)
