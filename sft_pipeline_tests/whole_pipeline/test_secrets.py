"""Passwords and tokens of the environment reach no file, no output and no command line of a whole run."""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, quote_plus

import psutil
import pyarrow.parquet as pq
import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline_tests.branches import SHORT, write_branch
from sft_pipeline_tests.command import ROOT, environment_of, sft, sft_command
from sft_pipeline_tests.tracking.stand_ins import stand_in
from sft_pipeline_tests.whole_pipeline.guarded_mlflow import GuardedMlflow, guarded_mlflow

# Signs that addresses spell in another way are among them.
USER_INFO, QUERY = "uri+p@ss/w0rd-1a2b", "qu3ry+t0ken-3c4d"
VARIABLES = {
    "MLFLOW_TRACKING_PASSWORD": "tracking+p@ss-5e6f",
    "MLFLOW_TRACKING_TOKEN": "tracking-t0ken-7a8b",
    "HF_TOKEN": "hf_0123456789secretABCDEF",
    "WANDB_API_KEY": "wandb0123456789secretabcdef01234567890abc",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+0123456789/ABCDEFGHIJKLMNOPQR",
}
DOTENV = "d0tenv-secret-9c0d"
SECRETS = (USER_INFO, QUERY, *VARIABLES.values(), DOTENV)
SPELLINGS = sorted(
    {
        f(s)
        for s in SECRETS
        for f in (str, quote, quote_plus, lambda s: quote(s, safe=""), lambda s: quote(s, safe="@"))
    }
)
RECIPE = SHORT | {"training": SHORT["training"] | {"report_to": ["tensorboard"]}}


@dataclass
class Project:
    """A folder with dagster.yaml and .env, and a store beside it."""

    folder: Path
    home: Path
    command_lines: set[str] = field(default_factory=set)

    def run(self, uri: str, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`sft run` in the project; every command line on the machine is looked at meanwhile."""
        env = environment_of(
            self.home, self.folder, MLFLOW_TRACKING_URI=uri, MLFLOW_TRACKING_USERNAME="robot"
        )
        env |= VARIABLES | {"SFT_PROJECT_ROOT": str(self.folder), "PYTHONPATH": str(ROOT), **environment}
        with self._watching():
            return subprocess.run(
                sft_command("run", "small_lora", *more),
                cwd=self.folder,
                env=env,
                capture_output=True,
                text=True,
                timeout=600,
            )

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                for process in psutil.process_iter():
                    with contextlib.suppress(psutil.Error):
                        self.command_lines.add(" ".join(process.cmdline()))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").symlink_to(ROOT / "data")
    (folder / ".env").write_text(f"SOME_SERVICE_PASSWORD={DOTENV}\nHF_TOKEN={VARIABLES['HF_TOKEN']}\n")
    write_branch(folder, recipe=RECIPE)
    return Project(folder, tmp_path_factory.mktemp("store") / "home")


def leaks(*texts: str) -> list[str]:
    return [spelling for spelling in SPELLINGS for text in texts if spelling in text]


def leaking_files(*folders: Path, at_least: int = 100) -> dict[str, list[str]]:
    """The files in which a secret can be read, also in the pages of Parquet files; .env is to hold them.

    Args:
        at_least: So many files must be there, or the search has looked in the wrong place.
    """
    found = {}
    paths = [p for folder in folders for p in folder.rglob("*") if p.is_file() and p.name != ".env"]
    assert len(paths) > at_least
    for path in paths:
        text = path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            text += str(pq.read_table(path).to_pylist()) + str(pq.read_schema(path).metadata)
        if secrets := leaks(text):
            found[str(path)] = secrets
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the MLflow server."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def door(server: Path) -> Iterator[GuardedMlflow]:
    known = {f"robot:{USER_INFO}", f"robot:{VARIABLES['MLFLOW_TRACKING_PASSWORD']}"}
    with guarded_mlflow(server / "mlflow", known) as found:
        yield found


@pytest.mark.slow
def test_no_secret_is_written_printed_or_on_a_command_line(
    project: Project, door: GuardedMlflow, server: Path
) -> None:
    address = f"http://robot:{quote(USER_INFO, safe='')}@127.0.0.1:{door.port}"
    began = time.time()
    done = project.run(f"{address}/?token={quote_plus(QUERY)}", "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 1 and '"status": "exported"' in done.stdout
    assert "MLflow" not in done.stderr and "registered small_lora version 1" in done.stderr
    assert door.let_in and door.tokens, "the secrets were needed, and used"
    assert list(project.home.rglob("events.out.tfevents*")), "what TensorBoard keeps is searched too"
    assert (project.home / "dagster").is_dir() and list(server.rglob("mlflow.db"))
    assert leaks(done.stdout, done.stderr, *project.command_lines) == []
    assert any("sft_pipeline.launch.child" in line for line in project.command_lines)
    assert leaking_files(project.folder, project.home, server) == {}
    in_work = [p for p in Path("/tmp").glob("*") if p.is_file() and _is_new(p, began)]
    assert not [p for p in in_work if leaks(p.read_bytes().decode("latin-1"))]


def _is_new(path: Path, began: float) -> bool:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime >= began and os.access(path, os.R_OK)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuses", "401", "500", "password"])
def test_a_failure_of_the_server_prints_and_writes_no_secret(
    project: Project, door: GuardedMlflow, kind: str
) -> None:
    """After the whole run, everything is reused but the registration, with another server."""
    with stand_in("refuses" if kind == "password" else kind) as bad:
        port = door.port if kind == "password" else bad.port
        wrong = quote("wr0ng+" + USER_INFO, safe="")
        uri = f"http://robot:{wrong}@127.0.0.1:{port}/?token={quote_plus(QUERY)}"
        done = project.run(uri, "--set", "export.license=mit", SFT_DEBUG="1")
    assert done.returncode == 0, done.stderr[-4000:]
    [warning] = [line for line in done.stderr.splitlines() if "MLflow" in line]
    assert f"http://127.0.0.1:{port}" in warning
    assert leaks(done.stdout, done.stderr, *project.command_lines) == []
    assert leaking_files(project.folder, project.home) == {}


@pytest.mark.parametrize("wrapped", [False, True], ids=["a library's error", "the cause of one of ours"])
def test_an_error_with_an_address_in_it_is_kept_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    """Dagster keeps errors with their causes and the lines of their tracebacks."""
    address = f"https://robot:{quote(USER_INFO, safe='')}@127.0.0.1/rows?token={quote_plus(QUERY)}"

    def fails(_: Build) -> Built:
        try:
            raise ConnectionError(f"no answer from {address}, nor with {VARIABLES['HF_TOKEN']}")
        except ConnectionError as error:
            if wrapped:
                raise InputError("the source does not answer") from error
            raise

    monkeypatch.setattr("sft_pipeline.stages.raw_rows.build.build", fails)
    config, home = write_branch(tmp_path / "config"), tmp_path / "home"
    ran = sft(
        *("run", "small_lora", "--json", "--until", "raw_rows"),
        home=home,
        config=config,
        MLFLOW_TRACKING_URI=address,
        **VARIABLES,
    )
    assert ran.code == (2 if wrapped else 1) and "answer" in ran.stderr
    assert leaks(ran.stderr, str(ran.json)) == []
    assert leaking_files(tmp_path, at_least=5) == {}
