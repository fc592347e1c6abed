"""The labelling page: its routes, and what its templates are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from stages.core.evaluation.wording import number, percent
from stages.core.execution.runtime import in_time
from stages.core.labelling.answers import CHOICES, RANKED, RANKING_CHOICES, check_ranks
from stages.core.labelling.desk import Desk, Shown
from stages.core.labelling.gallery import Picture
from stages.core.labelling.measures import agreement, first_share
from stages.core.pages.server import page_templates, show

FOLDER = Path(__file__).parent
STATIC = FOLDER / "static"

MAX_NAME = 40
SMALL_SIDE = 256
"""Images below this are enlarged with their pixels kept sharp."""
KEPT = "private, max-age=31536000, immutable"
"""An image's address names its bytes: the browser need not ask again."""

Row = dict[str, Any]


def check_name(name: str) -> str | None:
    """What is wrong with a labeller's name; None if nothing is."""
    if not name:
        return "Please give a name: your sides and your order depend on it."
    if len(name) > MAX_NAME:
        return f"The name has {len(name)} letters; at most {MAX_NAME} can be used."
    if not name.isprintable():
        return "The name holds a letter that cannot be shown; please use others."
    return None


class LabellingPage:
    """Answers the browser, from a desk."""

    def __init__(self, desk: Desk, title: str) -> None:
        self.desk, self.title = desk, title
        self.is_ranking = any(pair.is_ranked for pair in desk.pairs)
        self._templates = page_templates(FOLDER / "templates")

    def routes(self) -> list[BaseRoute]:
        """What the page answers."""
        return [
            Route("/", self.home),
            Route("/image/{digest}", self.image),
            Route("/answer", self.take(self._answer), methods=["POST"]),
            Route("/undo", self.take(self._undo), methods=["POST"]),
        ]

    def home(self, request: Request) -> Response:
        """The pair before a labeller, or the form that asks for their name."""
        name = request.query_params.get("labeller")
        problem = None if name is None else check_name(name := name.strip())
        if name is None or problem:
            context = {"title": self.title, "problem": problem, "labellers": self.desk.labellers(),
                       "name": name or "", "max_name": MAX_NAME, "num_pairs": len(self.desk.pairs),
                       "is_ranking": self.is_ranking}  # fmt: skip
            return show(self._templates, "name.html.jinja", context, 400 if problem else 200)
        return show(self._templates, "desk.html.jinja", self.view(name))

    def image(self, request: Request) -> Response:
        """An image that was shown, by the digest of its bytes."""
        picture = self.desk.gallery.find(request.path_params["digest"])
        if picture is None:
            return PlainTextResponse("There is no such image.", 404)
        return Response(
            picture.data, media_type=picture.media_type, headers={"cache-control": KEPT}
        )

    def take(self, action: Callable[[str, Row], str]) -> Callable[[Request], Any]:
        """An endpoint that does something for a labeller, and shows the pair that is next."""

        async def endpoint(request: Request) -> Response:
            try:
                asked = json.loads(await request.body())
                name = asked["labeller"]
                if not isinstance(name, str) or check_name(name) or name != name.strip():
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                return PlainTextResponse("Expected a JSON object with the name of a labeller.", 400)
            return await run_in_threadpool(self._after, action, name, asked)

        return endpoint

    def _after(self, action: Callable[[str, Row], str], name: str, asked: Row) -> Response:
        note = action(name, asked)
        return show(self._templates, "pair.html.jinja", self.view(name, note))

    def _answer(self, name: str, asked: Row) -> str:
        choice, key = asked.get("answer"), asked.get("pair")
        choices = RANKING_CHOICES if self.is_ranking else CHOICES
        ranks: tuple[int, ...] | None = ()
        if choice == RANKED and (pair := self.desk.find(key)):
            ranks = check_ranks(asked.get("ranks"), len(pair.places))
        if choice not in choices or not isinstance(key, str) or ranks is None:
            return "That is no answer; nothing was written down."
        if not self.desk.answer(name, key, choice, ranks):
            return "That pair was answered in another window. This is the next one."
        return ""

    def _undo(self, name: str, _asked: Row) -> str:
        return "" if self.desk.undo(name) else "There is nothing to take back."

    def view(self, name: str, note: str = "") -> Row:
        """What the templates are given."""
        shown = self.desk.current(name)
        upcoming = self.desk.upcoming(name) if shown else None
        progress = self.desk.progress(name)
        share = 100 * progress.num_mine / max(1, progress.num_mine + progress.num_left)
        return {
            "title": self.title,
            "name": name,
            "note": note,
            "pair": _pair(shown) if shown else None,
            "preload": [image.digest for image in upcoming.pictures] if upcoming else [],
            "what": "sets" if self.is_ranking else "pairs",
            "is_ranking": self.is_ranking,
            "progress": progress,
            "percent_done": round(share),
            "pace": _pace(progress.pairs_per_minute),
            "time_left": in_time(progress.seconds_left)
            if progress.seconds_left is not None
            else None,
            "can_undo": progress.num_mine > 0,
            "unusable": sorted(set(self.desk.unusable.values())),
            "num_stale": len(self.desk.stale),
            **self._measures(name),
        }

    def _measures(self, name: str) -> Row:
        answers = self.desk.answers()
        own = first_share(answer for answer in answers if answer.labeller == name)
        found = agreement(answers)
        return {
            "left": own
            and {
                "share": percent(own.share),
                "low": percent(own.low),
                "high": percent(own.high),
                "expected": percent(own.expected),
                "num_choices": own.num_choices,
                "is_biased": own.is_biased,
            },
            "agreement": found if found.num_pairs else None,
            "raw": None if found.raw is None else percent(found.raw),
            "alpha": None if found.alpha is None else number(found.alpha, 2),
        }


def _pace(pairs_per_minute: float | None) -> str | None:
    if pairs_per_minute is None:
        return None
    return number(pairs_per_minute, 0 if pairs_per_minute >= 10 else 1)


def _pair(shown: Shown) -> Row:
    return {
        "key": shown.pair.key,
        "prompt": shown.pair.prompt,
        "images": [_image(picture) for picture in shown.pictures],
    }


def _image(picture: Picture) -> Row:
    return {
        "digest": picture.digest,
        "width": picture.width,
        "height": picture.height,
        "is_small": max(picture.width, picture.height) < SMALL_SIDE,
    }
