"""Texts without this machine's folders, and whether one may have been made from another."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.portable_paths import machine_folders, may_be_portable, portable
from sft_pipeline.project import project_root

PLACES = (
    "{root}/data/rows.jsonl",
    "{root}/data/",
    "{root}",
    "{root}/",
    "{home}/models/base",
    "~/models/base",
    "~",
    "/foo/",
    "/mnt//b/x",
    "/a b/c d/e",
    "file:{root}/x y.jsonl",
    "file:/srv/models/base/",
    "file:~",
    "sqlite:////var/lib/mlflow.db",
    "sqlite:///{root}/.sft/mlflow.db",
    "read {root}/a.md, then {home}/b.md (see /etc/c)",
    "data/rows.jsonl",
    "5/6 rows",
    "",
    "/",
    "…/x",
)


@pytest.fixture(params=["project", "a project"])
def root(request, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / request.param
    folder.mkdir()
    (folder / "dagster.yaml").write_text("")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SFT_HOME", raising=False)
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_whatever_is_made_portable_may_have_been(root, place):
    assert project_root() == root
    text = place.format(root=root, home=os.path.expanduser("~"))
    assert may_be_portable(text, portable(text)), portable(text)


@settings(max_examples=1_000, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", " ", "=", "(", '"', "file:", "sqlite:///"]),
            st.sampled_from(["/", "~", "~/x", "a", "b/c", "é", "…", *machine_folders()]),
            st.sampled_from(["", "/", "/y z", "//k/"]),
        ),
        max_size=4,
    )
)
def test_any_text(parts):
    text = " ".join("".join(part) for part in parts)
    assert may_be_portable(text, portable(text)), portable(text)


@pytest.mark.parametrize(
    ("text", "shorter"),
    [
        ("/home/ann/project/data/rows.jsonl", "data/rows2.jsonl"),
        ("/home/ann/project/data/rows.jsonl", "other/rows.jsonl"),
        ("see /home/ann/a.md: 5 rows", "see a.md: 6 rows"),
        ("data/rows.jsonl", "rows.jsonl"),
        ("5/6 rows", "56 rows"),
        ("1.0", "1"),
        ("all is well", "all"),
    ],
)
def test_what_was_changed_is_not_portable(text, shorter):
    assert not may_be_portable(text, shorter)
