"""The table of reasons for people is the one of the code."""

from sft_pipeline.stages.grouped_split.write import NEAR_DUPLICATE
from sft_pipeline.stages.validated_rows.quarantine import Reason
from sft_pipeline.text.reasons import MEANING
from sft_pipeline_tests.command import ROOT


def test_every_reason_is_in_the_table_with_its_meaning():
    text = (ROOT / "docs" / "reasons.md").read_text()
    expected = {str(r): r.explanation for r in Reason} | {str(r): meaning for r, meaning in MEANING.items()}
    for reason, meaning in expected.items():
        assert f"`{reason}` | {meaning} |" in text, reason
    assert f"`{NEAR_DUPLICATE}`" in text
    assert text.count("\n| ") - 2 == len(list(Reason)) + len(MEANING) + 1
