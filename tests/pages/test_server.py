"""The guards of a page's server: token, host, origin, headers; and how it is started and ended."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from stages.core.errors import UserError
from stages.core.pages.server import (
    HEADERS,
    MAX_BODY,
    bind,
    build_app,
    new_token,
    page_templates,
    serve,
    show,
)
from tests.security.hostile import PAGE, SCRIPT

TOKEN = "a-token"
HERE = "http://127.0.0.1:8765"
SAME = {"origin": HERE}


async def home(request: Request) -> Response:
    return PlainTextResponse("home " + request.url.query)


async def typed(request: Request) -> Response:
    return PlainTextResponse("got " + (await request.body()).decode())


async def broken(request: Request) -> Response:
    raise UserError("pairs.parquet is damaged")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    (tmp_path / "own.js").write_text("1;")
    routes = [
        Route("/", home),
        Route("/typed", typed, methods=["POST"]),
        Route("/broken", broken),
    ]
    app = build_app(routes, token=TOKEN, static=tmp_path)
    with TestClient(app, base_url=HERE, follow_redirects=False) as found:
        yield found


@pytest.fixture
def known(client: TestClient) -> TestClient:
    client.get("/", params={"token": TOKEN})
    return client


def test_the_first_address_becomes_a_cookie_and_the_same_address_without_the_token(
    client: TestClient,
) -> None:
    answer = client.get("/?view=pairs&token=a-token")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?view=pairs")
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith("sail-8765=a-token;")
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.get("/?view=pairs").text == "home view=pairs"


@pytest.mark.parametrize("path", ["//elsewhere.example/x", "/\\elsewhere.example"])
def test_the_token_leads_nowhere_else(client: TestClient, path: str) -> None:
    location = client.get(HERE + path + "?token=a-token").headers["location"]
    assert location[0] == "/"
    assert location[1] not in "/\\"


@pytest.mark.parametrize("path", ["/", "/static/own/own.js", "/static/pages/page.css", "/nowhere"])
def test_without_the_token_nothing_is_shown(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 403
    assert "Open the address that the command has printed" in answer.text
    assert client.post("/typed", content="x", headers=SAME).status_code == 403


@pytest.mark.parametrize("token", ["another", "", "a-token ", "é", "a-tokena-token"])
def test_a_wrong_token_is_refused(client: TestClient, token: str) -> None:
    assert client.get("/", params={"token": token}).status_code == 403
    client.cookies.set("sail-8765", "another")
    assert client.get("/").status_code == 403


def test_the_cookie_of_a_server_on_another_port_is_not_this_ones(client: TestClient) -> None:
    client.cookies.set("sail-8766", TOKEN)
    assert client.get("/").status_code == 403


@pytest.mark.parametrize(
    "host", ["elsewhere.example", "127.0.0.1.elsewhere.example", "10.0.0.1:8765", "localhost.", ""]
)
def test_a_foreign_host_is_refused_before_its_token_is_looked_at(
    known: TestClient, host: str
) -> None:
    assert known.get("/", headers={"host": host}).status_code == 400
    answer = known.get("/?token=a-token", headers={"host": host})
    assert answer.status_code == 400
    assert "set-cookie" not in answer.headers


def test_through_a_tunnel_the_page_has_another_port(client: TestClient) -> None:
    tunnel = {"host": "localhost:9000"}
    client.cookies.set("sail-9000", TOKEN)
    origin = {"origin": "http://localhost:9000"}
    assert client.post("/typed", content="x", headers=tunnel | origin).text == "got x"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "null"},
        {"origin": "http://elsewhere.example"},
        {"origin": "http://127.0.0.1:8766"},
        {"origin": "https://127.0.0.1:8765"},
        {"origin": "http://localhost:8765"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_what_another_page_asks_for_is_refused(
    known: TestClient, method: str, headers: dict[str, str]
) -> None:
    assert known.request(method, "/typed", content="x", headers=headers).status_code == 403


def test_a_post_of_this_page_is_taken_unless_it_is_long(known: TestClient) -> None:
    assert known.post("/typed", content="x", headers=SAME).text == "got x"
    long = b"x" * (MAX_BODY + 1)
    assert known.post("/typed", content=long, headers=SAME).status_code == 413
    assert known.post("/typed", content=iter([long]), headers=SAME).status_code == 413


@pytest.mark.parametrize(
    ("path", "host"),
    [("/", "127.0.0.1"), ("/nowhere", "127.0.0.1"), ("/", "elsewhere.example"),
     ("/static/pages/page.css", "127.0.0.1"), ("/broken", "127.0.0.1")],
)  # fmt: skip
def test_every_answer_forbids_what_is_not_of_this_server(
    known: TestClient, path: str, host: str
) -> None:
    answer = known.get(path, headers={"host": f"{host}:8765"})
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert answer.headers["cache-control"] == "no-store"
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http:" not in policy
    assert "access-control-allow-origin" not in answer.headers


def test_a_picture_that_is_opened_alone_has_an_icon_too(
    client: TestClient, known: TestClient
) -> None:
    answer = known.get("/favicon.ico")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    client.cookies.clear()
    assert client.get("/favicon.ico").status_code == 403


def test_what_a_person_can_put_right_is_said(known: TestClient) -> None:
    answer = known.get("/broken")
    assert (answer.status_code, answer.text) == (500, "error: pairs.parquet is damaged")
    assert answer.headers["content-type"].startswith("text/plain")


def test_static_files_are_those_of_the_folders_alone(known: TestClient) -> None:
    assert known.get("/static/own/own.js").text == "1;"
    assert "--ink" in known.get("/static/pages/page.css").text
    assert known.get(HERE + "/static/own/%2e%2e/%2e%2e/etc/passwd").status_code == 404


@pytest.mark.parametrize("text", [*PAGE, "NUL \x00 inside"])
def test_a_template_escapes_whatever_it_is_given(tmp_path: Path, text: str) -> None:
    source = "{% extends 'base.html.jinja' %}{% block body %}<p title=\"{{ t }}\">{{ t }}</p>"
    (tmp_path / "own.html.jinja").write_text(source + "{% endblock %}")
    answer = show(page_templates(tmp_path), "own.html.jinja", {"t": text})
    assert isinstance(answer, HTMLResponse)
    page = bytes(answer.body).decode()
    assert "<script>" not in page
    assert "<img" not in page
    assert "\x00" not in page


def test_a_template_misses_nothing_silently(tmp_path: Path) -> None:
    (tmp_path / "own.html.jinja").write_text("{{ absent }}")
    with pytest.raises(Exception, match="'absent' is undefined"):
        show(page_templates(tmp_path), "own.html.jinja", {"t": SCRIPT})


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port} is in use.*--port 0"):
            serve(build_app([], token=TOKEN, static=tmp_path), token=TOKEN, port=port,
                  open_browser=False)  # fmt: skip
    with pytest.raises(UserError, match=r"--port 70000 cannot be bound.*from 1024 to 65535"):
        bind(70000)


def test_only_the_loopback_address_is_bound() -> None:
    with bind(0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


def test_tokens_are_long_and_differ() -> None:
    assert len({new_token() for _ in range(100)}) == 100
    assert min(map(len, (new_token() for _ in range(100)))) >= 32


SERVER = """
import sys
from pathlib import Path
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from stages.core.pages.server import build_app, serve
async def home(request): return PlainTextResponse("home")
folder = Path(sys.argv[1])
serve(build_app([Route("/", home)], token="a-token", static=folder), token="a-token", port=0,
      open_browser=True)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_server_prints_its_address_answers_and_ends_calmly(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={"PATH": "/usr/bin"},
    )  # fmt: skip
    assert server.stdout is not None
    address = server.stdout.readline().split()[1]
    assert address.startswith("http://127.0.0.1:")
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(address, timeout=60) as answer:
        assert answer.read() == b"home"
        assert "token" not in answer.url
    server.send_signal(number)
    _, errors = server.communicate(timeout=60)
    assert server.returncode == code
    assert "Traceback" not in errors
