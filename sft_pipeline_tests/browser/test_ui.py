"""Both UIs in headless Chromium, on a finished branch: what their APIs hold, and what a user sees of it."""

import http.client
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_pipeline.stages.graph import STAGES
from sft_pipeline_tests.branches import Finished
from sft_pipeline_tests.command import environment_of, sft_command
from sft_pipeline_tests.network import entries, watched_by

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
READY_SECONDS = 180
VISIBLE = 60_000  # ms


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ui:
    """`sft ui` on free ports, with what a browser would ask of it."""

    def __init__(self, branch: Finished) -> None:
        self.branch = branch
        port, mlflow_port = free_port(), free_port()
        self._log = (branch.home / "ui.log").open("w")
        self.network = branch.home / "ui_network.jsonl"
        self._process = subprocess.Popen(
            sft_command("ui", "--port", str(port), "--mlflow-port", str(mlflow_port)),
            env=environment_of(branch.home, branch.config, **watched_by(self.network)),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        self.dagster, self.mlflow = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{mlflow_port}"
        self._until(lambda: self.location()["loadStatus"] == "LOADED", "the code location")
        self._until(
            lambda: urllib.request.urlopen(f"{self.mlflow}/health", timeout=5).status == 200, "MLflow"
        )

    def _until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            try:
                if ready():
                    return
            except (OSError, KeyError, IndexError, TypeError):
                pass
            assert self._process.poll() is None, Path(self._log.name).read_text()[-3000:]
            time.sleep(0.2)
        raise AssertionError(f"{what} was not ready: {Path(self._log.name).read_text()[-3000:]}")

    def ask(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"{self.dagster}/graphql", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["data"]

    def mlflow_api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.mlflow}/api/2.0/mlflow/{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def location(self) -> Any:
        query = """{workspaceOrError{... on Workspace{locationEntries{
            name loadStatus locationOrLoadError{__typename ... on PythonError{message}}}}}}"""
        return self.ask(query)["workspaceOrError"]["locationEntries"][0]

    def keys(self) -> dict[str, list[str]]:
        """{stage name: path of the asset}, of the whole branch."""
        return {
            name: [self.branch.dataset if stage.of_dataset else self.branch.recipe, name]
            for name, stage in STAGES.items()
        }

    def asset(self, key: list[str]) -> Any:
        """An asset's latest materialization of the branch's snapshot, and the last status of its checks."""
        query = """query($k: AssetKeyInput!, $p: [String!]){assetNodeOrError(assetKey: $k){... on AssetNode{
            partitionStats{numMaterialized numFailed numMaterializing}
            latestMaterializationByPartition(partitions: $p){runId metadataEntries{__typename label}}
            assetChecksOrError{... on AssetChecks{
                checks{name blocking executionForLatestMaterialization{status}}}}}}}"""
        return self.ask(query, k={"path": key}, p=[self.branch.snapshot])["assetNodeOrError"]

    LAUNCH = """mutation($p: ExecutionParams!){launchPipelineExecution(executionParams:$p){__typename
        ... on LaunchRunSuccess{run{runId}} ... on PythonError{message}}}"""

    def run_of(self, assets: list[list[str]]) -> dict[str, Any]:
        """The variable of LAUNCH."""
        return {
            "selector": {
                "repositoryLocationName": "sft_pipeline",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
                "assetSelection": [{"path": a} for a in assets],
            },
            "mode": "default",
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": self.branch.snapshot}]},
            "runConfigData": "{}",
        }

    def runs(self) -> set[str]:
        query = "{runsOrError{... on Runs{results{runId}}}}"
        return {run["runId"] for run in self.ask(query)["runsOrError"]["results"]}

    def launch(self, assets: list[list[str]]) -> str:
        result = self.ask(self.LAUNCH, p=self.run_of(assets))["launchPipelineExecution"]
        assert result["__typename"] == "LaunchRunSuccess", result
        return result["run"]["runId"]

    def finish(self, run_id: str, seconds: float = 600) -> str:
        """Waits for the end of a run, and returns its status."""
        query = "query($r: ID!){runOrError(runId:$r){... on Run{status}}}"
        deadline = time.monotonic() + seconds
        while (status := self.ask(query, r=run_id)["runOrError"]["status"]) not in (
            "SUCCESS",
            "FAILURE",
            "CANCELED",
        ):
            assert time.monotonic() < deadline, f"run {run_id} is {status}"
            time.sleep(0.5)
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
def ui(finished: Finished) -> Iterator[Ui]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    server = Ui(finished)
    yield server
    server.close()


@pytest.fixture(scope="module")
def page(ui: Ui) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("websocket", lambda socket: page.asked.append(socket.url))
        yield page
        browser.close()


def see(page: Any, *texts: str) -> None:
    """Waits until each text is visible, as the whole text of an element."""
    for text in texts:
        page.get_by_text(text, exact=True).first.wait_for(timeout=VISIBLE)


def test_the_whole_branch_launched_from_the_ui_is_green(ui: Ui, page: Any) -> None:
    keys = ui.keys()
    run_id = ui.launch(list(keys.values()))
    assert ui.finish(run_id) == "SUCCESS"
    for name, key in keys.items():
        found = ui.asset(key)
        assert found["partitionStats"] == {"numMaterialized": 1, "numFailed": 0, "numMaterializing": 0}, key
        assert [m["runId"] for m in found["latestMaterializationByPartition"]] == [run_id], key
        checks = found["assetChecksOrError"]["checks"]
        assert {c["name"] for c in checks} == {c.name for c in STAGES[name].checks}
        for check in checks:
            status = check["executionForLatestMaterialization"]["status"]
            assert status == "SUCCEEDED" or (status == "FAILED" and not check["blocking"]), (key, check)
    page.goto(f"{ui.dagster}/runs/{run_id}")
    see(page, "Success", f"{len(keys)} assets", f"Succeeded ({len(keys)})", "Errored (0)")


def test_the_asset_graph_shows_the_branch(ui: Ui, page: Any) -> None:
    key = "/".join(ui.keys()["exported_model"])
    page.goto(f"{ui.dagster}/assets/{key}?view=lineage&lineageScope=upstream&lineageDepth=8")
    see(page, ui.branch.dataset, ui.branch.recipe)  # the groups
    see(page, *(set(STAGES) - {"trained_checkpoints"}))  # the graph shortens the longest name


def test_an_assets_page_has_its_state_its_tables_and_its_plots(ui: Ui, page: Any) -> None:
    key = ui.keys()["evaluation"]
    [materialization] = ui.asset(key)["latestMaterializationByPartition"]
    page.goto(f"{ui.dagster}/assets/{'/'.join(key)}?view=partitions&partition={ui.branch.snapshot}")
    see(page, "Materialized (1)", "Failed (0)", "Latest materialization", materialization["runId"][:8])
    scores = [
        name for name in ui.branch.json["metrics"]["tuned"] if name.endswith(("says_number", "_pass_rate"))
    ]
    see(page, "base_vs_tuned", *scores)  # a table of scores
    plots = page.locator("tr", has_text="base_vs_tuned_plot").get_by_text("[Show Markdown]")
    plots.first.click(timeout=VISIBLE)
    image = page.locator("img[src^='data:image/png']").first
    image.wait_for(timeout=VISIBLE)
    assert image.evaluate("image => image.naturalWidth") > 300


def test_an_assets_checks_are_shown_with_their_status(ui: Ui, page: Any) -> None:
    key = ui.keys()["packed_shards"]
    checks = ui.asset(key)["assetChecksOrError"]["checks"]
    page.goto(f"{ui.dagster}/assets/{'/'.join(key)}?view=checks")
    see(page, f"Checks ({len(checks)})", *(c["name"] for c in checks), "Succeeded")
    passed = sum(c["executionForLatestMaterialization"]["status"] == "SUCCEEDED" for c in checks)
    assert page.get_by_text("Succeeded", exact=True).count() == passed


def test_the_mlflow_run_has_its_curves(ui: Ui, page: Any) -> None:
    found = ui.mlflow_api("experiments/search", {"max_results": 100})["experiments"]
    experiments = {e["name"]: e["experiment_id"] for e in found}
    run = ui.branch.json["mlflow_run_id"]
    training = json.loads((ui.branch.artifact("trained_checkpoints") / "training.json").read_text())
    history = ui.mlflow_api(f"metrics/get-history?run_id={run}&metric_key=loss&max_results=5000")["metrics"]
    assert [m["step"] for m in history] == list(range(1, training["updates"]["done"] + 1))
    page.goto(f"{ui.mlflow}/#/experiments/{experiments[ui.branch.recipe]}/runs/{run}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill("val_loss")  # charts below the fold are not drawn
    see(page, "val_loss")
    page.locator(".scatterlayer path.js-line").first.wait_for(timeout=VISIBLE)


ELSEWHERE = """<!doctype html><body><form id=f method=post enctype="text/plain" target=frame></form>
<iframe name=frame></iframe><img id=i><script>
const url = %(url)s, body = %(body)s, query = %(query)s;
const attempt = (address, options) => fetch(address, options).then(r => r.status, () => "no answer");
const json = {"Content-Type": "application/json"}, plain = {"Content-Type": "text/plain"};
Promise.all([
  attempt(url + query), attempt(url + query, {mode: "no-cors"}),
  attempt(url, {method: "POST", body, headers: json}),
  attempt(url, {method: "POST", body, headers: plain, mode: "no-cors"}),
  new Promise(done => { i.onload = i.onerror = done; i.src = url + query; }),
  new Promise(done => {
    f.action = url; f.innerHTML = "<input name='x'>"; f.elements[0].name = body.slice(0, -1) + ',"a":"';
    f.elements[0].value = '"}'; document.querySelector("iframe").onload = done; f.submit();
    setTimeout(done, 3000);
  }),
]).then(found => { document.title = "done " + JSON.stringify(found.slice(0, 4)); });
</script>"""


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_page_from_elsewhere_starts_nothing_and_reads_nothing(ui: Ui, page: Any, name: str) -> None:
    variables = {"p": ui.run_of([ui.keys()["raw_rows"]])}
    before = ui.runs()
    query = "?" + urllib.parse.urlencode({"query": Ui.LAUNCH, "variables": json.dumps(variables)})
    values = {
        "url": json.dumps(f"{ui.dagster}/graphql"),
        "body": json.dumps(json.dumps({"query": Ui.LAUNCH, "variables": variables})),
        "query": json.dumps(query),
    }
    served = (ELSEWHERE % values).encode()

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(served)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        page.goto(f"http://{name}:{elsewhere.server_port}/")
        page.wait_for_function("document.title.startsWith('done')", timeout=30_000)
        assert "200" not in page.title(), page.title()
        elsewhere.shutdown()
    # A name that points here, as after DNS rebinding.
    body = json.dumps({"query": Ui.LAUNCH, "variables": variables})
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:80", "Origin": "http://evil.example"}):
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(ui.dagster).netloc, timeout=30)
        connection.request("POST", "/graphql", body, {"Content-Type": "application/json", **headers})
        assert connection.getresponse().status == 403
    assert ui.runs() == before


@pytest.mark.parametrize("server", ["dagster", "mlflow"])
def test_both_uis_answer_under_their_own_names_only(ui: Ui, server: str) -> None:
    address = urllib.parse.urlsplit(getattr(ui, server)).netloc
    for host, expected in (
        (address, 200),
        (address.replace("127.0.0.1", "localhost"), 200),
        ("evil.example", 403),
    ):
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.request("GET", "/", headers={"Host": host})
        assert connection.getresponse().status == expected, host


def test_neither_the_uis_nor_their_pages_ask_another_machine(ui: Ui, page: Any) -> None:
    """After all of the above, and after the pages that a visitor meets first."""
    for address in (
        f"{ui.dagster}/overview",
        f"{ui.dagster}/deployment/daemons",
        f"{ui.dagster}/assets",
        f"{ui.dagster}/runs",
        f"{ui.mlflow}/#/",
        f"{ui.mlflow}/#/experiments",
        f"{ui.mlflow}/#/models",
    ):
        page.goto(address)
        page.wait_for_timeout(2500)  # a page that polls is never idle
    assert len(page.asked) > 50
    asked = [url for url in page.asked if not url.startswith(("data:", "blob:"))]
    hosts = {urllib.parse.urlsplit(url).hostname for url in asked}
    assert hosts <= {"127.0.0.1", "localhost"}, hosts
    assert any("dagster-daemon" in " ".join(command) for command in entries(ui.network, "watched"))
    assert any("mlflow" in " ".join(command) for command in entries(ui.network, "watched"))
    assert entries(ui.network, "found") == []
