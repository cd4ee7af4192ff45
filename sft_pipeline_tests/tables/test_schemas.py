"""The content key: equal exactly where messages and tools are."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.stages.validated_rows.asset import STAGE
from sft_pipeline.tables.schemas import content_key
from sft_pipeline_tests.dataset_runs import dataset, project, rows, run, write_jsonl

__all__ = ["project"]

TEXT = st.none() | st.text(st.characters(codec="utf-8"), max_size=3)
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["system", "user", "assistant"]), TEXT, st.sampled_from([None, 0.0, 1.0]), TEXT
    ),
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(given_rows=st.lists(st.tuples(MESSAGES, TEXT), min_size=1, max_size=6))
def test_keys_are_equal_exactly_where_contents_are(given_rows):
    named = [
        ([dict(zip(("role", "content", "weight", "tool_calls"), m)) for m in messages], tools)
        for messages, tools in given_rows
    ]
    keys = [content_key(*row) for row in named]
    texts = [json.dumps(row) for row in named]
    for key, text in zip(keys, texts):
        for other_key, other_text in zip(keys, texts):
            assert (key == other_key) == (text == other_text)


def test_the_key_does_not_depend_on_file_line_format_or_group(project: Path) -> None:
    """The same messages in another group, file and format; and other messages in the same group."""
    one = write_jsonl(project / "a.jsonl", [{"g": "x", "prompt": "Hi", "completion": "Hello"}])
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    two = write_jsonl(
        project / "b.jsonl",
        [{"g": "x", "messages": [*turns[:1], {**turns[1], "content": "Bye"}]}, {"g": "y", "messages": turns}],
    )
    config = dataset(
        {"path": str(one), "format": "prompt_completion", "columns": {"group": "g"}},
        {"path": str(two), "format": "messages", "columns": {"group": "g"}},
    )
    found = rows(run(config, project / "home", STAGE)["validated_rows"].artifact, "rows")
    same, other, elsewhere = (r["content_key"] for r in found)
    assert [r["group"] for r in found] == ["x", "x", "y"]
    assert same == elsewhere != other and len(same) == 16
