"""What a page of the audit shows: the query of its address, one item in words, and its neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast
from urllib.parse import quote, urlencode

from stages.core.artifacts.decisions import image_digest, subject
from stages.core.artifacts.provenance import ArtifactError
from stages.core.audit.cells import Cells, NoSuchCellError, signature
from stages.core.audit.desk import Desk
from stages.core.audit.draws import Draws, draws_plot
from stages.core.audit.index import (
    HOLDOUT_ORDERS,
    ORDERS,
    Candidate,
    Item,
    Listing,
    Place,
    RunIndex,
    View,
    ordered,
)
from stages.core.evaluation.wording import DASH, number

Row = dict[str, Any]

VIEWS = {"pairs": "Prompts", "human": "Human pairs", "holdout": "Held-out pairs"}
ONLY: dict[str, dict[str, str]] = {
    "pairs": {"all": "all", "open": "not decided yet", "decided": "decided"},
    "human": {"all": "all", "open": "not decided yet", "decided": "decided"},
    "holdout": {"wrong": "that the judge gets wrong", "all": "all"},
}
STATES = {"accept": "accepted", "flip": "flipped", "veto": "vetoed"}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, kw_only=True)
class Query:
    """What an address asks for; whatever it does not know is the default."""

    view: View
    iteration: int
    order: str
    only: str
    q: str
    key: str

    @property
    def address(self) -> str:
        """The same, as the end of an address."""
        return urlencode({name: getattr(self, name) for name in self.__dataclass_fields__})

    @property
    def place(self) -> str:
        """Which table is looked at."""
        return f"{self.view}-{self.iteration}"


def read_query(values: Mapping[str, str], index: RunIndex) -> Query:
    """The query of an address, with what the run has for what it has not."""
    has = {"pairs": bool(index.iterations), "human": index.has_human, "holdout": index.has_holdout}
    view = values.get("view", "")
    if not has.get(view):
        view = next(name for name in VIEWS if has[name])
    numbers = {"pairs": index.iterations, "human": [0], "holdout": index.judges or [0]}[view]
    asked = values.get("iteration", "")
    iteration = int(asked) if asked.isdecimal() and len(asked) < 9 else -1
    orders = orders_of(cast(View, view))
    return Query(
        view=cast(View, view),
        iteration=iteration if iteration in numbers else numbers[-1],
        order=values["order"] if values.get("order") in orders else next(iter(orders)),
        only=values["only"] if values.get("only") in ONLY[view] else next(iter(ONLY[view])),
        q=values.get("q", "")[:500],
        key=values.get("key", "")[:1000],
    )


def orders_of(view: View) -> dict[str, Any]:
    """How the items of a view may be ordered."""
    return {"pairs": ORDERS, "human": {"table": ORDERS["table"]}, "holdout": HOLDOUT_ORDERS}[view]


@dataclass(frozen=True)
class Found:
    """What a query finds."""

    listing: Listing
    items: list[Item]
    item: Item | None
    """The one that is shown."""
    position: int | None
    """Its number among the items, from 1; None if it is none of them."""
    previous: str
    """Key of the item before it, or nothing."""
    following: str


class Reader:
    """Turns queries into what templates show."""

    def __init__(self, index: RunIndex, desk: Desk) -> None:
        self.index, self.desk = index, desk
        self.cells = Cells(index.run)
        self._last: tuple[tuple[str, str, str], Listing, list[Item]] | None = None

    def find(self, query: Query, listing: Listing) -> list[Item]:
        """The items of a query, in their order."""
        asked = (query.place, query.order, query.q)
        last = self._last
        if last is None or last[0] != asked or last[1] is not listing:
            words = query.q.casefold().split()
            found = [item for item in listing.items
                     if all(word in item.prompt.casefold() for word in words)]  # fmt: skip
            found = ordered(found, orders_of(query.view)[query.order])
            last = self._last = (asked, listing, found)
        items = last[2]
        if query.only == "wrong":
            items = [i for i in items if i.judged is None or i.judged["probability"] < 0.5]
        elif query.only != "all":
            is_open = query.only == "open"
            items = [i for i in items if i.pair and (not self.desk.by_identity(i.pair)) == is_open]
        return items

    def look(self, query: Query) -> Found:
        """What a query finds; the first item where it names none, or one that is there no more."""
        listing = self.index.listing(query.view, query.iteration)
        items = self.find(query, listing)
        at = next((n for n, item in enumerate(items) if item.key == query.key), None)
        if at is None and query.key:
            alone = next((item for item in listing.items if item.key == query.key), None)
            if alone is not None:  # decided just now, and no longer among those that are listed
                return Found(listing, items, alone, None, "", items[0].key if items else "")
        if not items:
            return Found(listing, items, None, None, "", "")
        at = at or 0
        previous = items[at - 1].key if at else ""
        following = items[at + 1].key if at + 1 < len(items) else ""
        return Found(listing, items, items[at], at + 1, previous, following)

    def digests(self, item: Item) -> tuple[str, str] | None:
        """Of winner and loser; None without a pair, or where the table cannot be read."""
        if item.place is None:
            return None
        try:
            winner, loser = (self.cells.read(item.place.table, item.place.row, f"{side}.bytes")
                             for side in ("winner", "loser"))  # fmt: skip
        except (ArtifactError, NoSuchCellError):
            return None
        return image_digest(winner or b""), image_digest(loser or b"")

    def show(self, query: Query, said: str = "") -> Row:
        """What the template of an item needs."""
        found = self.look(query)
        item, listing = found.item, found.listing
        exponent = self.index.exponent
        where = replace(query, key=item.key if item else "")
        counts = self.desk.counts(0 if query.view == "human" else query.iteration)
        context: Row = {
            "query": where, "previous": replace(query, key=found.previous) if found.previous else None,
            "following": replace(query, key=found.following) if found.following else None,
            "said": said, "item": None, "problems": listing.problems,
            "num_items": len(found.items), "num_all": len(listing.items),
            "position": found.position,
            "tally": ", ".join(f"{counts[kind]} {word}" for kind, word in STATES.items()),
            "decides": query.view != "holdout",
            "is_human": query.view == "human", "seed_heeds": self.index.seed_heeds_decisions,
        }  # fmt: skip
        return context if item is None else context | {"item": self._item(item, query, exponent)}

    def _item(self, item: Item, query: Query, exponent: int) -> Row:
        digests = self.digests(item)
        about = subject(item.pair["prompt_id"], *digests) if item.pair and digests else None
        state = self.desk.of(about) if about else None
        sides = (
            [self._side(item, side, exponent) for side in ("winner", "loser")] if item.pair else []
        )
        return {
            "key": item.key, "prompt": item.prompt, "has_pair": item.pair is not None,
            "digests": digests, "state": STATES.get(state or "", ""), "kind": state or "",
            "note": self.desk.note_of(about) if about else "",
            "facts": facts(item, query, exponent), "sides": sides,
            "candidates": self._candidates(item, exponent),
            "plot": self._plot(item, exponent), "unit": unit(exponent), "lineage": lineage(item),
        }  # fmt: skip

    def _side(self, item: Item, side: str, exponent: int) -> Row:
        """Winner or loser, large."""
        assert item.pair is not None
        assert item.place is not None
        number_of = item.pair[f"{side}_candidate"]
        found = next((c for c in item.candidates if c.number == number_of), None)
        reward = item.judged[f"{side}_reward"] if item.judged else found.reward if found else None
        error = found.standard_error if found else None
        return {
            "side": side,
            "name": side if number_of is None else f"{side}, candidate {number_of}",
            "src": self.source(*(
                (found.place, "image") if found else (item.place, side)
            )),
            "reward": reward_text(reward, error, exponent),
        }  # fmt: skip

    def _candidates(self, item: Item, exponent: int) -> list[Row]:
        """All candidates: best and worst, then the others from the best on."""

        def rank(c: Candidate) -> tuple[int, float]:
            place = ("best", "worst", "").index(mark_of(c, item, item.candidates))
            return place, math.inf if c.reward is None else -c.reward

        return [
            {
                "number": c.number,
                "src": self.source(c.place, "image"),
                "mark": mark_of(c, item, item.candidates),
                "word": word_of(c, item),
                "reward": reward_text(c.reward, c.standard_error, exponent),
                "scores": [(name, number(score, 3)) for name, score in c.scores.items()],
            }
            for c in sorted(item.candidates, key=rank)
        ]

    def _plot(self, item: Item, exponent: int) -> Any:
        rows = []
        try:
            if item.judged is not None and item.judged_place is not None:
                for side, kind in (("winner", "best"), ("loser", "worst")):
                    errors = self._errors(item.judged_place, f"{side}_")
                    rows.append(Draws(side, errors, kind, item.judged[f"{side}_reward"]))
            for c in sorted(item.candidates, key=lambda c: -(c.reward or 0.0)):
                if c.errors is not None:
                    mark = mark_of(c, item, item.candidates)
                    rows.append(Draws(f"cand. {c.number}", self._errors(c.errors), mark, c.reward))
        except (ArtifactError, NoSuchCellError):
            return None
        return draws_plot(rows, exponent)

    def _errors(self, place: Place, prefix: str = "") -> list[float]:
        """Each draw's reference error minus policy error."""
        policy, reference = (self.cells.read(place.table, place.row, f"{prefix}{whose}_errors")
                             for whose in ("policy", "reference"))  # fmt: skip
        return [r - p for p, r in zip(policy, reference, strict=True)]

    def source(self, place: Place, column: str) -> str:
        """The address of an image; another one once its table has been made anew."""
        made = signature(self.index.run / place.table)
        return f"/image/{quote(place.table)}/{place.row}/{column}?made={made[0] if made else 0}"


def mark_of(candidate: Candidate, item: Item, found: Sequence[Candidate]) -> str:
    """'best' or 'worst' of a prompt: by its pair, before there is one by the reward; else nothing."""
    if item.pair is not None:
        sides = {item.pair["winner_candidate"]: "best", item.pair["loser_candidate"]: "worst"}
        return sides.get(candidate.number, "")
    rewards = [c.reward for c in found if c.reward is not None]
    if candidate.reward is None or len(set(rewards)) < 2:
        return ""
    return {max(rewards): "best", min(rewards): "worst"}.get(candidate.reward, "")


def word_of(candidate: Candidate, item: Item) -> str:
    """The same in words; the images of a list's further pairs are called winner and loser."""
    mark = mark_of(candidate, item, item.candidates)
    return {"best": "winner", "worst": "loser"}.get(mark, "") if item.is_inner else mark


def unit(exponent: int) -> str:
    """In what rewards are shown: '10⁻⁶', or nothing."""
    return f"10{str(exponent).translate(SUPERSCRIPTS)}" if exponent else ""


def reward_text(reward: float | None, error: float | None, exponent: int) -> str:
    """A reward with its standard error, both in the unit of the page."""
    text = number(scaled(reward, exponent), 2, sign=True)
    return (
        text if error is None or text == DASH else f"{text} ± {number(scaled(error, exponent), 2)}"
    )


def scaled(value: float | None, exponent: int) -> float | None:
    """The value in units of 10 ** exponent."""
    return None if value is None else value / 10**exponent


def facts(item: Item, query: Query, exponent: int) -> list[tuple[str, str]]:
    """What is known of a pair, in a few numbers: what needs eyes first comes first."""
    pair, judged = item.pair, item.judged
    if query.view == "holdout":
        if judged is None:
            return [("judge", "has not looked at it")]
        margin = judged["winner_reward"] - judged["loser_reward"]
        right = "right" if judged["probability"] > 0.5 else "wrong"
        return [("judge", f"{right}: p(the people's winner) = {number(judged['probability'], 3)}"),
                ("margin", number(scaled(margin, exponent), 2, sign=True))]  # fmt: skip
    if pair is None:
        return [("pair", "none: left out by select_pairs, or not made yet")]
    if pair["margin"] is None:
        return [("label", "a person's; no model has judged it")]
    ratio, metric = item.margin_in_errors, item.metric_margin()
    found = [
        ("margin", reward_text(pair["margin"], pair["margin_standard_error"], exponent)),
        ("in standard errors", number(ratio, 1, sign=True)),
        ("p(winner > loser)", number(pair["probability"], 3)),
    ]
    if metric is not None:
        name = next(iter(item.candidates[0].scores))
        found.append((f"{name}, winner minus loser", number(metric, 3, sign=True)))
    return found


def lineage(item: Item) -> list[tuple[str, str]]:
    """Where an item came from: policy and seeds, or file and row."""
    found: list[tuple[str, str]] = []
    if item.pair is not None:
        pair = item.pair
        found.append(("pair", pair["pair_id"]))
        if pair["source_file"] is not None:
            found.append(("label", f"{pair['source_file']}, row {pair['source_row']} (from 0)"))
        if pair["policy_digest"] is not None:
            found.append(
                ("policy", f"{pair['policy_digest']}, of iteration {pair['iteration'] - 1}")
            )
        for side in ("winner", "loser"):
            if pair[f"{side}_seed"] is not None:
                found.append(
                    (side, f"candidate {pair[f'{side}_candidate']}, seed {pair[f'{side}_seed']}")
                )
    if item.place is not None:
        found.append(("table", f"{item.place.table}, row {item.place.row}"))
    others = (
        {item.pair[f"{side}_candidate"] for side in ("winner", "loser")} if item.pair else set()
    )
    found += [(f"candidate {c.number}", f"seed {c.seed}; {c.place.table}, row {c.place.row}")
              for c in item.candidates if c.number not in others]  # fmt: skip
    return found
