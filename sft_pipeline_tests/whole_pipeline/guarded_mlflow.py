"""A real MLflow server behind a door that asks for credentials, as companies have it."""

import base64
import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

READY_SECONDS = 180
OWN_VARIABLES = ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH")  # the server is to know no secret
HOP_BY_HOP = ("connection", "transfer-encoding", "content-length", "keep-alive", "authorization", "host")


@dataclass
class GuardedMlflow:
    """Where the door is, and who came: the credentials that were let in or turned away, and query tokens."""

    port: int
    let_in: set[str] = field(default_factory=set)
    turned_away: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)


@contextlib.contextmanager
def guarded_mlflow(folder: Path, credentials: set[str]) -> Iterator[GuardedMlflow]:
    """Serves MLflow from a database in `folder` to those with one of the `credentials` ("user:password")."""
    with _mlflow_server(folder) as inner, _door(inner, credentials) as door:
        yield door


@contextlib.contextmanager
def _mlflow_server(folder: Path) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    folder.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    env = {name: os.environ[name] for name in OWN_VARIABLES if name in os.environ}
    env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.3)
        yield port
    finally:
        os.killpg(server.pid, 15)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
            server.wait()


@contextlib.contextmanager
def _door(inner: int, credentials: set[str]) -> Iterator[GuardedMlflow]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            # A client puts what it asks for behind the address, and so behind the query of one that has some.
            path = self.path
            if inside := re.match(r"/\?token=([^/&]*)/", path):
                found.tokens.add(inside[1])
                path = "/" + path[inside.end() :].replace("&", "?", 1)
            scheme, _, encoded = self.headers.get("Authorization", "").partition(" ")
            given = base64.b64decode(encoded).decode() if scheme == "Basic" else encoded
            if given not in credentials:
                found.turned_away.add(given)
                return self.send(401, [], b"wrong credentials")
            found.let_in.add(given)
            kept = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
            connection = http.client.HTTPConnection("127.0.0.1", inner, timeout=60)
            with contextlib.closing(connection):
                connection.request(self.command, path, body, kept)
                reply = connection.getresponse()
                self.send(reply.status, reply.getheaders(), reply.read())

        def send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found = GuardedMlflow(server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
