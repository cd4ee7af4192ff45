"""Nothing is asked of another machine that nobody named; the UIs and their pages: `browser/test_ui.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

from sft_pipeline_tests.branches import Finished
from sft_pipeline_tests.command import environment_of
from sft_pipeline_tests.network import entries, watched_by


def test_a_whole_branch_asks_no_other_machine(finished: Finished) -> None:
    commands = [" ".join(command) for command in entries(finished.network, "watched")]
    assert any("run " + finished.recipe in command for command in commands)
    # The supervised children of the model stages are among those that were watched.
    assert sum("sft_pipeline.launch.child" in command for command in commands) >= 4, commands
    assert entries(finished.network, "found") == []


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("socket.getaddrinfo('example.invalid', 80)", "example.invalid"),
        ("socket.gethostbyname('example.invalid')", "example.invalid"),
        ("socket.create_connection(('192.0.2.1', 9), 0.01)", "192.0.2.1"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))", "192.0.2.1"),
        ("urllib.request.urlopen('http://example.invalid/')", "example.invalid"),
        ("socket.socket().connect_ex(('127.0.0.1', 9))", None),
        ("socket.getaddrinfo('localhost', 80)", None),
    ],
)
def test_the_guard_sees_what_leaves_the_machine(tmp_path: Path, code: str, seen: str | None) -> None:
    log = tmp_path / "network.jsonl"
    command = [sys.executable, "-c", f"import socket, urllib.request\ntry: {code}\nexcept OSError: pass"]
    child = [sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"]
    subprocess.run(child, env=environment_of(tmp_path, **watched_by(log)), check=True)
    assert len(entries(log, "watched")) == 2
    found = entries(log, "found")
    assert (seen in found[0]["address"]) if seen else found == []
