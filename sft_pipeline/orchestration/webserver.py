"""Dagster's web server, answering only its own pages: `python -m sft_pipeline.orchestration.webserver`.

Dagster's own answers anyone who reaches it: a page elsewhere in the user's browser can launch runs by a GET,
a form, or a host name that points to loopback (DNS rebinding). Here a request must name this server as its
Host, come from its own Origin where it has one, and GraphQL is asked by POST with JSON alone.
(https://cheatsheetseries.owasp.org/cheatsheets/Cross-Site_Request_Forgery_Prevention_Cheat_Sheet.html)
"""

import sys
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SAFE = ("GET", "HEAD")


class OwnPagesOnly:
    """ASGI middleware that refuses requests of other pages.

    Args:
        hosts: The names under which this server is reached, as in the header Host ("127.0.0.1:3000").
    """

    def __init__(self, app: Application, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal = self.refusal(scope.get("method", "GET"), scope["path"], headers, scope["type"])
        if refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        else:
            status, why = refusal
            body = why.encode()
            kind = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": status, "headers": kind})
            await send({"type": "http.response.body", "body": body})

    def refusal(
        self, method: str, path: str, headers: Mapping[str, str], kind: str = "http"
    ) -> tuple[int, str] | None:
        """(HTTP status, why) of a request that is refused; None for one that is answered.

        Args:
            headers: Names in lower case.
        """
        if headers.get("host", "").lower() not in self.hosts:
            return 403, "this server answers under its own name only"
        origin = headers.get("origin")
        if origin is not None and (
            urlsplit(origin).scheme != "http" or urlsplit(origin).netloc.lower() not in self.hosts
        ):
            return 403, "this server answers its own pages only"
        # A browser says where a request comes from that has no Origin: a link, an image, a frame.
        elsewhere = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        opened = method in SAFE and headers.get("sec-fetch-mode") == "navigate" and path != "/graphql"
        if elsewhere and not (opened and headers.get("sec-fetch-dest") == "document"):
            return 403, "this server answers its own pages only"
        if kind == "http" and path.rstrip("/") == "/graphql":
            if method != "POST":
                return 405, "GraphQL is asked by POST"
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return 415, "GraphQL is asked with JSON"
        return None


def main(arguments: list[str]) -> None:
    """Runs Dagster's web server with this in front; the arguments are its own.

    `-h` and `-p` are read here too, since they say under which names the server is reached.
    """
    from dagster_webserver import cli
    from dagster_webserver.webserver import DagsterWebserver
    from starlette.middleware import Middleware

    host, port = (arguments[arguments.index(option) + 1] for option in ("-h", "-p"))
    names = [f"{name}:{port}" for name in {*LOOPBACK, host}]
    own = DagsterWebserver.build_middleware

    def build_middleware(self: Any) -> list[Middleware]:
        return [Middleware(OwnPagesOnly, hosts=names), *own(self)]

    DagsterWebserver.build_middleware = build_middleware  # type: ignore[method-assign]
    cli.cli(args=arguments, prog_name="dagster-webserver", auto_envvar_prefix="DAGSTER_WEBSERVER")


if __name__ == "__main__":
    main(sys.argv[1:])
