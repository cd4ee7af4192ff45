"""`sft ui`: the Dagster UI with its daemon and the MLflow UI, on loopback, until interrupted."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from rich.console import Console

from sft_pipeline.errors import InputError, SftError
from sft_pipeline.project import project_root
from sft_pipeline.secret_text import public_address

HOST = "127.0.0.1"
READY_SECONDS = 120


def serve(port: int, mlflow_port: int, console: Console) -> None:
    """Starts both servers, says when they answer, and takes both down on the way out."""
    from sft_pipeline.launch.reaper import reap_dead_runs
    from sft_pipeline.orchestration.instance import open_instance

    os.environ["SFT_DAGSTER_URL"] = f"http://{HOST}:{port}"
    tracking = os.environ["MLFLOW_TRACKING_URI"]
    mlflow_is_ours = not tracking.startswith("http")
    os.environ["SFT_MLFLOW_URL"] = (
        f"http://{HOST}:{mlflow_port}" if mlflow_is_ours else public_address(tracking)
    )
    with open_instance() as instance:
        for message in reap_dead_runs(instance):
            console.print(message)
    workspace = str(project_root() / "workspace.yaml")
    guarded = [sys.executable, "-m", "sft_pipeline.orchestration.webserver"]
    servers = {
        "Dagster": _start([*guarded, "-h", HOST, "-p", str(port), "-w", workspace]),
        "Dagster daemon": _start([_program("dagster-daemon"), "run", "-w", workspace]),
    }
    if mlflow_is_ours:
        where = ["--host", HOST, "--port", str(mlflow_port), "--workers", "1"]
        # The address of a database may hold a password, which everybody could read on a command line.
        os.environ["MLFLOW_BACKEND_STORE_URI"] = tracking
        servers["MLflow"] = _start([_program("mlflow"), "server", *where])
    try:
        console.print("starting the UIs; Ctrl-C stops them")
        _wait(servers["Dagster"], "Dagster", f"http://{HOST}:{port}/server_info", console)
        if mlflow_is_ours:
            _wait(servers["MLflow"], "MLflow", f"http://{HOST}:{mlflow_port}/health", console)
        while True:
            for name, server in servers.items():
                if server.poll() is not None:
                    raise SftError(
                        f"{name} stopped with exit code {server.returncode}; is its port taken? "
                        "Choose others with --port and --mlflow-port"
                    )
            time.sleep(0.5)
    except KeyboardInterrupt:
        console.print("stopping the UIs")
    finally:
        for server in servers.values():
            _stop(server)


def _program(name: str) -> str:
    path = Path(sys.executable).with_name(name)
    found = str(path) if path.exists() else shutil.which(name)
    if found is None:
        raise InputError(
            f"{name} is not installed beside this Python: pip install it, or run `make demo` once"
        )
    return found


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=project_root(), start_new_session=True)


def _wait(server: subprocess.Popen[bytes], name: str, url: str, console: Console) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                console.print(f"{name}: {url.rsplit('/', 1)[0]}")
                return
        except OSError:
            time.sleep(0.5)
    raise SftError(f"the {name} UI did not answer at {url}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGINT, 10), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        if server.poll() is None:
            os.killpg(server.pid, number)
            try:
                server.wait(patience)
            except subprocess.TimeoutExpired:
                continue
