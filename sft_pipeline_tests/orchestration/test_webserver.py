"""Dagster's web server behind the guard: only its own pages are answered."""

import asyncio
from typing import Any

import pytest

from sft_pipeline.orchestration.webserver import LOOPBACK, OwnPagesOnly

HOST = "127.0.0.1:3000"
JSON = {"content-type": "application/json"}


def guard(app: Any = None) -> OwnPagesOnly:
    return OwnPagesOnly(app, [f"{name}:3000" for name in LOOPBACK])


def refused(method: str, path: str, kind: str = "http", **headers: str) -> int | None:
    given = {"host": HOST} | {name.replace("_", "-"): value for name, value in headers.items()}
    found = guard().refusal(method, path, given, kind)
    return found and found[0]


@pytest.mark.parametrize("host", ["127.0.0.1:3000", "localhost:3000", "LOCALHOST:3000", "[::1]:3000"])
def test_its_own_pages_are_answered(host: str) -> None:
    own = {"host": host, "origin": f"http://{host.lower()}", "sec_fetch_site": "same-origin"}
    assert refused("POST", "/graphql", **own, content_type="application/json; charset=utf-8") is None
    assert refused("GET", "/assets/a/b", host=host, sec_fetch_site="none", sec_fetch_mode="navigate") is None
    assert refused("GET", "/_next/chunk.js", host=host, sec_fetch_site="same-origin") is None
    assert refused("GET", "/graphql", "websocket", **own) is None
    # A command has neither Origin nor Sec-Fetch headers.
    assert refused("POST", "/graphql", host=host, content_type="application/json") is None
    assert refused("GET", "/server_info", host=host) is None


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:3000", "127.0.0.1", "127.0.0.1:3001", "localhost", "", "0.0.0.0:3000"],
)
def test_other_names_of_this_machine_are_refused(host: str) -> None:
    assert refused("POST", "/graphql", host=host, content_type="application/json") == 403
    assert refused("GET", "/", host=host) == 403
    assert refused("GET", "/graphql", "websocket", host=host) == 403


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://127.0.0.1:3000",
        "http://127.0.0.1:5000",
        "http://127.0.0.1",
        "http://127.0.0.1:3000.evil.example",
        "http://localhost:3000@evil.example",
        "null",
        "",
        "file://",
    ],
)
def test_pages_of_other_origins_are_refused(origin: str) -> None:
    assert refused("POST", "/graphql", origin=origin, content_type="application/json") == 403
    assert refused("POST", "/report_asset_materialization/a", origin=origin) == 403
    assert refused("GET", "/graphql", "websocket", origin=origin) == 403
    assert refused("OPTIONS", "/graphql", origin=origin) == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_a_page_elsewhere_embeds_is_refused_and_a_link_is_opened(site: str) -> None:
    for destination in ("image", "script", "iframe", "empty", "embed"):
        assert refused("GET", "/assets", sec_fetch_site=site, sec_fetch_dest=destination) == 403
    link = {"sec_fetch_site": site, "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    assert refused("GET", "/assets/a/b", **link) is None
    assert refused("GET", "/graphql", **link) == 403
    assert refused("POST", "/assets/a/b", **link) == 403


@pytest.mark.parametrize(
    ("method", "kind", "status"),
    [
        ("GET", "application/json", 405),
        ("HEAD", "application/json", 405),
        ("PUT", "application/json", 405),
        ("POST", "text/plain", 415),
        ("POST", "application/x-www-form-urlencoded", 415),
        ("POST", "multipart/form-data; boundary=x", 415),
        ("POST", "application/graphql", 415),
        ("POST", "", 415),
    ],
)
@pytest.mark.parametrize("path", ["/graphql", "/graphql/"])
def test_graphql_is_asked_by_post_with_json(method: str, kind: str, status: int, path: str) -> None:
    assert refused(method, path, content_type=kind) == status


def test_a_refused_request_never_reaches_the_application() -> None:
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def ask(kind: str, host: str) -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"Host", host.encode())]
        await guard(app)({"type": kind, "method": "GET", "path": "/x", "headers": headers}, receive, send)
        return sent

    assert asyncio.run(ask("http", "evil.example"))[0]["status"] == 403
    assert asyncio.run(ask("websocket", "evil.example"))[0]["type"] == "websocket.close"
    assert reached == []
    asyncio.run(ask("http", HOST))
    assert reached == ["/x"]
