"""The table of reasons for people is the one of the code."""

from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.text.reasons import MEANING
from sft_pipeline_tests.command import ROOT


def test_every_reason_is_in_the_table_with_its_meaning():
    text = (ROOT / "docs" / "reasons.md").read_text()
    expected = [*((r, r.explanation) for r in RejectReason), *MEANING.items()]
    for reason, meaning in expected:
        assert f"`{reason}` | {meaning} |" in text, reason
    assert text.count("\n| ") - 2 == len(expected)
