"""Both UIs in headless Chromium, on the embedded default."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_pipeline_tests.command import ROOT, Ran

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
READY_SECONDS = 180


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ui:
    """`sft ui` on free ports, with what a browser would ask of it."""

    def __init__(self, home: Path) -> None:
        self.port, self.mlflow_port = free_port(), free_port()
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("DAGSTER_HOME", "MLFLOW_TRACKING_URI", "SFT_DAGSTER_DIR")
        }
        env |= {"SFT_HOME": str(home), "SFT_PROJECT_ROOT": str(ROOT)}
        self._log = (home / "ui.log").open("w")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "sft_pipeline.cli",
                "ui",
                "--port",
                str(self.port),
                "--mlflow-port",
                str(self.mlflow_port),
            ],
            env=env,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self.dagster, self.mlflow = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.mlflow_port}"
        self._until(lambda: self.location()["loadStatus"] == "LOADED", "the code location")
        self._until(
            lambda: urllib.request.urlopen(f"{self.mlflow}/health", timeout=5).status == 200, "MLflow"
        )

    def _until(self, ready: Any, what: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            try:
                if ready():
                    return
            except (OSError, KeyError, IndexError, TypeError):
                pass
            assert self._process.poll() is None, Path(self._log.name).read_text()[-3000:]
            time.sleep(0.5)
        raise AssertionError(f"{what} was not ready: {Path(self._log.name).read_text()[-3000:]}")

    def ask(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"{self.dagster}/graphql", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def location(self) -> Any:
        query = "{workspaceOrError{... on Workspace{locationEntries{name loadStatus locationOrLoadError{__typename ... on PythonError{message}}}}}}"
        return self.ask(query)["workspaceOrError"]["locationEntries"][0]

    def launch(self, assets: list[list[str]], snapshot: str) -> str:
        mutation = """mutation($p: ExecutionParams!){launchPipelineExecution(executionParams:$p){__typename
            ... on LaunchRunSuccess{run{runId}} ... on PythonError{message}}}"""
        answer = self.ask(
            mutation,
            p={
                "selector": {
                    "repositoryLocationName": "sft_pipeline",
                    "repositoryName": "__repository__",
                    "pipelineName": "__ASSET_JOB",
                    "assetSelection": [{"path": a} for a in assets],
                },
                "mode": "default",
                "executionMetadata": {"tags": [{"key": "dagster/partition", "value": snapshot}]},
                "runConfigData": "{}",
            },
        )["launchPipelineExecution"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def status(self, run_id: str) -> str:
        return self.ask("query($r: ID!){runOrError(runId:$r){... on Run{status}}}", r=run_id)["runOrError"][
            "status"
        ]

    def finish(self, run_id: str, seconds: float = 600) -> str:
        deadline = time.monotonic() + seconds
        while (status := self.status(run_id)) not in ("SUCCESS", "FAILURE", "CANCELED"):
            assert time.monotonic() < deadline, f"run {run_id} is {status}"
            time.sleep(1)
        return status

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(40)
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._log.close()


@pytest.fixture(scope="module")
def ui(demo: Ran, demo_home: Path) -> Iterator[Ui]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    server = Ui(demo_home)
    yield server
    server.close()


@pytest.fixture(scope="module")
def page(ui: Ui) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser.new_page(viewport={"width": 1600, "height": 1000})
        browser.close()


def shot(page: Any, demo_home: Path, name: str) -> None:
    page.screenshot(path=str(demo_home / f"{name}.png"))


def see(page: Any, url: str, *texts: str) -> None:
    page.goto(url)
    for text in texts:
        page.get_by_text(text, exact=False).first.wait_for(timeout=60_000)


def test_the_whole_branch_launched_from_the_ui_is_green(
    ui: Ui, page: Any, demo: Ran, demo_home: Path
) -> None:
    from sft_pipeline.stages.graph import STAGES

    assets = [["access_policy" if s.of_dataset else "access_policy_lora", name] for name, s in STAGES.items()]
    run_id = ui.launch(assets, "2026-05-20")
    assert ui.finish(run_id) == "SUCCESS"
    see(page, f"{ui.dagster}/runs/{run_id}", "packed_shards")
    shot(page, demo_home, "run")


def test_the_asset_graph_shows_the_branch(ui: Ui, page: Any, demo_home: Path) -> None:
    url = f"{ui.dagster}/assets/access_policy_lora/exported_model?view=lineage&lineageScope=upstream&lineageDepth=8"
    see(page, url, "raw_rows", "packed_shards", "evaluation")  # the graph shortens the longest names
    page.wait_for_timeout(3000)
    shot(page, demo_home, "graph")


def test_an_assets_metadata_has_tables_and_plots(ui: Ui, page: Any, demo_home: Path) -> None:
    see(
        page,
        f"{ui.dagster}/assets/access_policy_lora/evaluation?view=partitions&partition=2026-05-20",
        "policy_pass_rate",
    )
    page.wait_for_timeout(3000)
    shot(page, demo_home, "evaluation")
    see(page, f"{ui.dagster}/assets/access_policy_lora/packed_shards?view=checks", "plan_covers_every_block")
    shot(page, demo_home, "checks")


def test_the_mlflow_run_has_its_curves(ui: Ui, page: Any, demo: Ran, demo_home: Path) -> None:
    body = json.dumps({"max_results": 100}).encode()
    request = urllib.request.Request(
        f"{ui.mlflow}/api/2.0/mlflow/experiments/search", body, {"Content-Type": "application/json"}
    )
    experiments = {
        e["name"]: e["experiment_id"] for e in json.load(urllib.request.urlopen(request))["experiments"]
    }
    run = demo.json["mlflow_run_id"]
    see(
        page,
        f"{ui.mlflow}/#/experiments/{experiments['access_policy_lora']}/runs/{run}/model-metrics",
        "Model metrics",
    )
    page.get_by_placeholder("Search metric charts").fill("val_loss")  # charts below the fold are not drawn
    page.get_by_text("val_loss", exact=False).first.wait_for(timeout=60_000)
    page.wait_for_timeout(3000)
    shot(page, demo_home, "mlflow")
    history = json.load(
        urllib.request.urlopen(f"{ui.mlflow}/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key=loss")
    )
    assert len(history["metrics"]) > 10
