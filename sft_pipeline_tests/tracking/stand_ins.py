"""Servers that are no good: each listens on this machine and answers as its kind does, or not at all."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("refuses", "hangs", "401", "500", "503")


@dataclass
class StandIn:
    """Where it is, and the requests that it got."""

    port: int
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def stand_in(kind: str) -> Iterator[StandIn]:
    """A server that refuses the connection, never answers, or answers everything with a status.

    With 503 it asks for an hour's patience too.
    """
    if kind == "refuses":
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        yield StandIn(port)
        return
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            found.asked.append(self.path)
            if kind == "hangs":
                over.wait()
                return
            self.send_response(int(kind))
            if kind == "503":
                self.send_header("Retry-After", "3600")
            body = b"not for you"
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found = StandIn(server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        over.set()
        server.shutdown()
        server.server_close()
