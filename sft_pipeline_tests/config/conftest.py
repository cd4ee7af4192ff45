"""One workshop for each module of tests that build branches."""

from collections.abc import Iterator

import pytest

from sft_pipeline_tests.config.every_key import Workshop
from sft_pipeline_tests.evaluation.world import one_thread

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    from sft_pipeline_tests.config.small_branch import workshop

    with workshop(tmp_path_factory.mktemp("every_key")) as found:
        yield found
