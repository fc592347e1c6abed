"""A server of pages for one person on this machine: a Starlette app with guards, and how it is run.

Only the loopback address is bound. The first address holds a random token; it becomes a cookie, and the
browser is sent on to the same place without it. Every answer forbids scripts, styles and pictures from
elsewhere. Nothing is sent to anybody.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
)
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stages.core.errors import UserError

HOST = "127.0.0.1"
HOSTS = (HOST, "localhost")
"""What a browser may call this server; any port, for `ssh -L` chooses its own."""
READING = ("GET", "HEAD")
MAX_BODY = 2**16
"""Bytes of a POST; a note is far shorter."""
FOLDER = Path(__file__).parent

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Of every answer. What else a page shows in its pictures comes from this server too."""
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
"""Control characters, which no page can hold, and their pictures: NUL as ␀."""


class Guard:
    """Middleware: an answer only to who has the token, and to no other page's form or script."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse with 403 or 413, turn a token into a cookie, or pass the request on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return  # there are no web sockets here
        request = Request(scope, receive)
        answer = self.answer(request)
        await (self.app if answer is None else answer)(scope, receive, send)

    def answer(self, request: Request) -> Response | None:
        """What is said instead of the page; None where nothing is wrong."""
        cookie = cookie_name(request)
        if request.method in READING and "token" in request.query_params:
            if not self._is_right(request.query_params["token"]):
                return refusal("this address has an old token, of a server that has ended")
            without = request.url.remove_query_params("token")
            target = without.path + (f"?{without.query}" if without.query else "")
            sent_on = RedirectResponse("/" + target.lstrip("/\\"), status_code=303)
            sent_on.set_cookie(cookie, self.token, httponly=True, samesite="strict")
            return sent_on
        if not self._is_right(request.cookies.get(cookie, "")):
            return refusal("this browser has not shown the token of this server")
        if request.method in READING:
            return None
        if request.headers.get("origin") != f"http://{request.headers['host']}":
            return refusal("another page has asked for this")
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            return PlainTextResponse(f"At most {MAX_BODY} bytes, of a length that is said.", 413)
        return None

    def _is_right(self, token: str) -> bool:
        return secrets.compare_digest(token.encode("utf-8", "replace"), self.token.encode())


class SetHeaders:
    """Middleware: `HEADERS` on every answer, and no copy in the browser unless the answer allows one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and add to what comes back."""

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self.app(scope, receive, add)


def cookie_name(request: Request) -> str:
    """The cookie's name; it names the port, because a host's servers all see the cookies of one another."""
    _, _, port = Headers(scope=request.scope).get("host", "").rpartition(":")
    return f"sail-{port if port.isdecimal() else '80'}"


def refusal(reason: str) -> Response:
    """403, and what to do."""
    return PlainTextResponse(
        f"Refused: {reason}. Open the address that the command has printed, token included.", 403
    )


def build_app(routes: Sequence[BaseRoute], *, token: str, static: Path) -> Starlette:
    """An app of these routes behind the guards; the files of `static` lie under /static/own.

    The style that all pages share is /static/pages/page.css. A UserError becomes a text with its message.
    """
    folders = {"/static/pages": FOLDER / "static", "/static/own": static}
    mounts = [Mount(place, StaticFiles(directory=folder)) for place, folder in folders.items()]
    return Starlette(
        routes=[*mounts, Route("/favicon.ico", icon), *routes],
        middleware=[
            Middleware(SetHeaders),
            Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False),
            Middleware(Guard, token=token),
        ],
        exception_handlers={UserError: tell},
    )


async def icon(request: Request) -> Response:
    """The pages' icon, for a browser that shows what no page of ours names it in, as a picture alone."""
    return FileResponse(FOLDER / "static" / "icon.svg")


async def tell(request: Request, error: Exception) -> Response:
    """A UserError's message."""
    return PlainTextResponse(f"error: {error}", 500)


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)


def page_templates(folder: Path) -> Environment:
    """Templates of a folder, and those that all pages share; every text is escaped."""
    return Environment(
        loader=FileSystemLoader([folder, FOLDER / "templates"]),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def show(
    templates: Environment, name: str, context: Mapping[str, object], status: int = 200
) -> HTMLResponse:
    """A template, filled."""
    return HTMLResponse(templates.get_template(name).render(context), status)


def _visible(value: object) -> object:
    return value.translate(PICTURES) if type(value) is str else value


def bind(port: int) -> socket.socket:
    """A socket on this port of the loopback address; 0 takes a free one. UserError if it is in use."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except (OSError, OverflowError) as error:
        bound.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            why = "is in use, perhaps by another such page"
        elif isinstance(error, OSError) and error.errno == errno.EACCES:
            why = "belongs to the system"
        else:
            why = f"cannot be bound ({error})"
        raise UserError(
            f"--port {port} {why}. Give another, from 1024 to 65535, or --port 0 for a free one."
        ) from error
    return bound


def serve(app: Starlette, *, token: str, port: int, open_browser: bool) -> None:
    """Serve the app until Ctrl-C or SIGTERM; the address goes to stdout.

    UserError if the port is in use.
    """
    with bind(port) as bound:
        address = f"http://{HOST}:{bound.getsockname()[1]}/?token={token}"
        bound.listen()  # who opens the address at once waits, and is not refused
        print(f"open {address}\nCtrl-C ends it", flush=True)
        if open_browser and has_desktop():
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, lifespan="off",
                ws="none", proxy_headers=False, timeout_graceful_shutdown=2,
            )
        )  # fmt: skip
        try:
            server.run(sockets=[bound])
        except KeyboardInterrupt:  # uvicorn raises it again after the last answer
            print("ended", file=sys.stderr)


def has_desktop() -> bool:
    """Whether there is a screen for a browser: without one, `webbrowser` may fill the terminal."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
