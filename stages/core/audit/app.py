"""The audit's app: a page, one item of it, its images, and what a key says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from stages.core.artifacts.images import ImageError, image_kind
from stages.core.audit.cells import Cells, NoSuchCellError
from stages.core.audit.desk import Desk
from stages.core.audit.index import RunIndex
from stages.core.audit.views import ONLY, STATES, VIEWS, Query, Reader, orders_of, read_query
from stages.core.errors import UserError
from stages.core.pages.server import build_app, page_templates, show

FOLDER = Path(__file__).parent
IMAGE_COLUMNS = ("image", "winner", "loser")
KINDS = {"png": "png", "jpg": "jpeg", "webp": "webp", "gif": "gif", "avif": "avif", "bmp": "bmp"}
"""What browsers show, by `image_kind`."""
FOREVER = "private, max-age=31536000, immutable"


def audit_app(index: RunIndex, desk: Desk, token: str) -> Starlette:
    """The pages of a run, behind the guards of `pages.server`."""
    pages = Pages(Reader(index, desk))
    routes = [
        Route("/", pages.page),
        Route("/item", pages.fragment),
        Route("/image/{table:path}/{row:int}/{column}", pages.image),
        Route("/decide", pages.decide, methods=["POST"]),
        Route("/undo", pages.undo, methods=["POST"]),
    ]
    return build_app(routes, token=token, static=FOLDER / "static")


class Pages:
    """The endpoints."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.index, self.desk = reader.index, reader.desk
        self.templates = page_templates(FOLDER / "templates")

    def page(self, request: Request) -> Response:
        """The whole page, with one item."""
        query = read_query(request.query_params, self.index)
        tabs = {view: name for view, name in VIEWS.items() if self._has(view)}
        numbers = {"pairs": self.index.iterations, "holdout": self.index.judges}.get(query.view, [])
        context = self.reader.show(query) | {
            "run": self.index.run.name,
            "tabs": tabs,
            "iterations": numbers,
            "orders": {name: words for name, (words, *_) in orders_of(query.view).items()},
            "only": ONLY[query.view],
        }
        return show(self.templates, "page.html.jinja", context)

    def fragment(self, request: Request) -> Response:
        """One item, to be put into the page."""
        return self._show(read_query(request.query_params, self.index))

    def image(self, request: Request) -> Response:
        """The bytes of an image as the table has them; 404 if it has none there."""
        table, row, column = (request.path_params[name] for name in ("table", "row", "column"))
        if column not in IMAGE_COLUMNS:
            return PlainTextResponse(f"no image column: {column!r}", 404)
        try:
            data = self._cells.read(table, row, f"{column}.bytes")
            kind = KINDS[image_kind(data, f"{table}, row {row}")]
        except NoSuchCellError:
            return PlainTextResponse("there is no such image", 404)
        except (ImageError, KeyError) as error:
            return PlainTextResponse(f"no image that a browser shows: {error}", 415)
        return Response(data, media_type=f"image/{kind}", headers={"cache-control": FOREVER})

    async def decide(self, request: Request) -> Response:
        """Keep a decision, then show the next item; after a note the same one."""
        form = dict(
            parse_qsl((await request.body()).decode("utf-8", "replace"), keep_blank_values=True)
        )
        return await run_in_threadpool(self._decide, form)

    async def undo(self, request: Request) -> Response:
        """Take the last decision back, and show what it was about."""
        form = dict(parse_qsl((await request.body()).decode("utf-8", "replace")))
        return await run_in_threadpool(self._undo, form)

    def _decide(self, form: dict[str, str]) -> Response:
        query = read_query(form, self.index)
        found = self.reader.look(query)
        item, following = found.item, found.following
        if query.view == "holdout":
            return PlainTextResponse("Held-out pairs measure the judge, so nothing is decided about them by "
                                     "who has seen what it says.", 409)  # fmt: skip
        if item is None or item.pair is None or item.key != query.key:
            return PlainTextResponse("There is no such pair any more. Load the page again.", 409)
        digests = self.reader.digests(item)
        if digests is None or digests != (form.get("winner"), form.get("loser")):
            return PlainTextResponse("The pair's images have changed since they were shown: its table was "
                                     "made anew. Nothing was kept. Load the page again.", 409)  # fmt: skip
        kind = form.get("kind", "")
        try:
            self.desk.decide(item.pair, *digests, kind, form.get("note", ""))
        except UserError as error:
            return PlainTextResponse(str(error), 400)
        if kind == "note":
            return self._show(query, "note kept")
        said = f"{STATES[kind]}: {item.prompt}"
        return self._show(replace(query, key=following or item.key), said if following else f"{said}. "
                          "That was the last one.")  # fmt: skip

    def _undo(self, form: dict[str, str]) -> Response:
        query = read_query(form, self.index)
        entry = self.desk.undo()
        if entry is None:
            return self._show(query, "nothing to undo")
        view = "pairs" if entry["policy_digest"] is not None else "human"
        there = read_query(
            form | {"view": view, "iteration": str(entry["iteration"]), "key": entry["pair_id"]},
            self.index,
        )
        return self._show(there, f"taken back: {entry['decision']} of {entry['prompt']}")

    def _show(self, query: Query, said: str = "") -> Response:
        return show(self.templates, "item.html.jinja", self.reader.show(query, said))

    def _has(self, view: str) -> bool:
        return {"pairs": bool(self.index.iterations), "human": self.index.has_human,
                "holdout": self.index.has_holdout}[view]  # fmt: skip

    @property
    def _cells(self) -> Cells:
        return self.reader.cells
