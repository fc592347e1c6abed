"""What a run has to look at: prompts with their candidates and pair, human pairs, held-out pairs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.schemas import (
    CANDIDATES,
    HOLDOUT_REWARDS,
    JUDGED,
    LIKED_PAIRS,
    LIKES,
    METRIC_SCORES,
    PREFERENCES,
    REWARDS,
    TRAINING_PAIRS,
    Schema,
)
from stages.core.artifacts.tables import holds, read_table
from stages.core.audit.cells import signature
from stages.core.errors import UserError

Row = dict[str, Any]
View = Literal["pairs", "human", "holdout"]

FACTS = [
    name
    for name in PREFERENCES.arrow.names
    if name not in ("winner", "loser")
]  # fmt: skip
"""Columns of a pair but for its images."""


class Place(NamedTuple):
    """A row of a table, as addresses of this server name it."""

    table: str
    row: int


@dataclass(slots=True)
class Candidate:
    """One image of a prompt, and what the judge says of it."""

    number: int
    seed: int
    place: Place
    reward: float | None = None
    standard_error: float | None = None
    errors: Place | None = None
    """Where the errors of its draws are (schema rewards)."""
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Item:
    """What is shown at once: a prompt with its candidates, one of a list's pairs with them, or a human pair."""

    key: str
    """Its name in addresses."""
    prompt: str
    pair: Row | None = None
    """The pair's columns but for its images; None where the prompt has no pair (yet)."""
    place: Place | None = None
    """Where the pair lies."""
    candidates: list[Candidate] = field(default_factory=list)
    is_inner: bool = False
    """Whether it is a further pair of a list, whose images are neither best nor worst."""
    judged: Row | None = None
    """Held-out pairs: what a policy says of it (schema holdout_rewards)."""
    judged_place: Place | None = None

    @property
    def margin_in_errors(self) -> float | None:
        """The margin over its standard error; None where it has none."""
        if self.pair is None or not self.pair["margin_standard_error"]:
            return None
        return float(self.pair["margin"] / self.pair["margin_standard_error"])

    @property
    def identity(self) -> tuple[Any, ...] | None:
        """By what an item is known without its images; another training makes another one."""
        if self.pair is None:
            return None
        return identity(self.pair)

    def metric_margin(self) -> float | None:
        """What the first metric says of the winner against the loser."""
        if self.pair is None:
            return None
        scores = {c.number: next(iter(c.scores.values()), None) for c in self.candidates}
        winner = scores.get(self.pair["winner_candidate"])
        loser = scores.get(self.pair["loser_candidate"])
        return None if winner is None or loser is None else winner - loser


def identity(pair: Mapping[str, Any]) -> tuple[Any, ...]:
    """By what a pair is known without its images: policy and seeds, or a human pair's name."""
    if pair["policy_digest"] is None:
        return (pair["pair_id"],)
    return (
        pair["prompt_id"],
        pair["policy_digest"],
        frozenset((pair["winner_seed"], pair["loser_seed"])),
    )


@dataclass
class Listing:
    """All items of a view, and what could not be read."""

    items: list[Item]
    problems: list[str]


Order = Callable[[Item], float | None]

ORDERS: dict[str, tuple[str, Order, int]] = {
    "unsure": ("smallest margin in standard errors", lambda item: item.margin_in_errors, 1),
    "sure": ("largest margin in standard errors", lambda item: item.margin_in_errors, -1),
    "unlikely": ("smallest p(winner > loser)", lambda item: _of(item, "probability"), 1),
    "likely": ("largest p(winner > loser)", lambda item: _of(item, "probability"), -1),
    "metric": ("metric least in favour of the winner", Item.metric_margin, 1),
    "table": ("as in the table", lambda item: None, 1),
}
"""How prompts may be ordered: in words, by what, and rising (1) or falling (-1)."""
HOLDOUT_ORDERS = {
    "wrong": ("most surely wrong first", lambda item: _judged(item, "probability"), 1),
    "close": ("nearest to p = 0.5 first", lambda item: abs(_judged(item, "probability") - 0.5), 1),
    "table": ORDERS["table"],
}


def _of(item: Item, name: str) -> float | None:
    return None if item.pair is None else item.pair[name]


def _judged(item: Item, name: str) -> float:
    return math.nan if item.judged is None else float(item.judged[name])


def ordered(items: Sequence[Item], order: tuple[str, Order, int]) -> list[Item]:
    """The items by an order; those that have no number come last, in their table's order."""
    _, measure, direction = order
    found = [measure(item) for item in items]
    values = np.array([np.nan if value is None else value for value in found], np.float64)
    return [items[i] for i in np.argsort(direction * values, kind="stable")]


class RunIndex:
    """The tables of a run's folder; each view is read when it is first asked for, and again when a table
    of it has changed.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._listings: dict[tuple[View, int], tuple[Any, Listing]] = {}
        if not run.is_dir():
            raise UserError(
                f"{run} is no folder; expected a run's results, as results/shapes. Name it as snakemake "
                "does: results/ and the config's `run`."
            )
        if not (self.iterations or self.has_human or self.has_holdout):
            raise UserError(
                f"{run} has no tables of a run: expected iter01/candidates/*.parquet, iter01/pairs.parquet "
                "or seed/preferences.parquet below it. Call snakemake first, or name another folder."
            )

    @property
    def iterations(self) -> list[int]:
        """Iterations that have candidates or pairs."""
        found = set()
        for folder in self.run.glob("iter[0-9][0-9]"):
            if any(folder.glob("candidates/*.parquet")) or (folder / "pairs.parquet").is_file():
                found.add(int(folder.name[4:]))
        return sorted(found - {0})

    @property
    def judges(self) -> list[int]:
        """Policies whose judgement of the held-out pairs is there."""
        files = self.run.glob("evaluation/holdout/iter[0-9][0-9].parquet")
        return sorted(int(path.stem[4:]) for path in files)

    @property
    def has_human(self) -> bool:
        """Whether there are human pairs to train on; single likes are none."""
        path = self.run / "seed/preferences.parquet"
        if not path.is_file():
            return False
        try:
            return not holds(path, LIKES)
        except ArtifactError:
            return True  # whoever looks at it is told

    @property
    def has_holdout(self) -> bool:
        """Whether there are held-out pairs."""
        return (self.run / "seed/holdout.parquet").is_file()

    @property
    def seed_heeds_decisions(self) -> bool:
        """Whether the run's config has the seed training follow decisions; no where there is none yet."""
        try:
            config = json.loads((self.run / "config.json").read_text(encoding="utf-8"))
            return bool(config["train_seed"]["use_decisions"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def listing(self, view: View, iteration: int) -> Listing:
        """The items of a view; of a judge for held-out pairs."""
        paths = self._paths(view, iteration)
        made = {path: signature(path) for path in paths}
        known = self._listings.get((view, iteration))
        if known is None or known[0] != made:
            problems: list[str] = []
            read = {"pairs": self._pairs, "human": self._human, "holdout": self._holdout}[view]
            known = (made, Listing(read(iteration, problems), problems))
            self._listings[view, iteration] = known
        return known[1]

    def warm(self) -> tuple[int, str]:
        """Read what the first page shows; how many items, of what."""
        if self.iterations:
            last = self.iterations[-1]
            return len(self.listing("pairs", last).items), f"prompts of iteration {last}"
        if not self.has_human:
            judge = (self.judges or [0])[-1]
            return len(self.listing("holdout", judge).items), "held-out pairs"
        return len(self.listing("human", 0).items), "human pairs"

    @cached_property
    def exponent(self) -> int:
        """The power of 1000, as one of 10, that makes the median margin of the run at least 1."""
        margins: list[float] = []
        for path in in_order(self.run.glob("iter[0-9][0-9]/pairs.parquet")):
            with suppress(ArtifactError):
                margins += read_table(path, TRAINING_PAIRS, ["margin"]).column("margin").to_pylist()
        if not margins and self.judges:
            names = ["winner_reward", "loser_reward"]
            with suppress(ArtifactError):
                table = read_table(self._judged_file(self.judges[0]), HOLDOUT_REWARDS, names)
                margins = np.subtract(*(table.column(name) for name in names)).tolist()
        sizes = [abs(margin) for margin in margins if margin and math.isfinite(margin)]
        return 3 * math.floor(math.log10(float(np.median(sizes))) / 3) if sizes else 0

    def _paths(self, view: View, iteration: int) -> list[Path]:
        if view == "human":
            return [self.run / "seed/preferences.parquet"]
        if view == "holdout":
            return [self.run / "seed/holdout.parquet", self._judged_file(iteration)]
        folder = self.run / f"iter{iteration:02d}"
        kinds = ("candidates/*", "scores/*", "candidate_scores/*", "judged", "pairs")
        return [path for kind in kinds for path in in_order(folder.glob(f"{kind}.parquet"))]

    def _judged_file(self, iteration: int) -> Path:
        """What a policy says of the held-out pairs, by its weights where it has some."""
        weighted = self.run / f"evaluation/judged/iter{iteration:02d}.parquet"
        plain = self.run / f"evaluation/holdout/iter{iteration:02d}.parquet"
        return weighted if weighted.is_file() else plain

    def _rows(
        self, path: Path, schema: Schema, columns: Sequence[str], problems: list[str]
    ) -> Iterator[tuple[Place, Row]]:
        """Rows with their places; of a table that cannot be read none, and a line among the problems."""
        try:
            table = read_table(path, schema, columns)
        except ArtifactError as error:
            problems.append(str(error))
            return
        name = str(path.relative_to(self.run))
        for number, values in enumerate(zip(*map(_values, table.columns), strict=True)):
            yield Place(name, number), dict(zip(columns, values, strict=True))

    def _held_out_columns(self, path: Path) -> tuple[Schema, list[str]]:
        """What is read of held-out pairs; of likes side by side the disliked images' prompts too."""
        with suppress(ArtifactError):
            if holds(path, LIKED_PAIRS):
                return LIKED_PAIRS, [*FACTS, "loser_prompt"]
        return PREFERENCES, FACTS

    def _pairs(self, iteration: int, problems: list[str]) -> list[Item]:
        items: dict[str, Item] = {}
        inner: dict[str, list[Item]] = {}
        images: dict[tuple[str, int], Candidate] = {}
        for path in self._paths("pairs", iteration):
            kind = path.parent.name
            if kind == "candidates":
                columns = ["prompt_id", "prompt", "candidate", "seed"]
                for place, row in self._rows(path, CANDIDATES, columns, problems):
                    key = f"iter{iteration:02d}-{row['prompt_id']}"
                    item = items.setdefault(row["prompt_id"], Item(key, row["prompt"]))
                    found = Candidate(row["candidate"], row["seed"], place)
                    images[row["prompt_id"], row["candidate"]] = found
                    item.candidates.append(found)
            elif kind in ("scores", "candidate_scores") or path.name == "judged.parquet":
                self._add_scores(path, images, problems)
            else:
                for place, row in self._rows(path, TRAINING_PAIRS, FACTS, problems):
                    new = Item(row["pair_id"], row["prompt"])
                    item = items.setdefault(row["prompt_id"], new)
                    if item.pair is not None:  # one prompt's list has a row for each of its pairs
                        new.candidates, new.is_inner = item.candidates, True
                        inner.setdefault(row["prompt_id"], []).append(new)
                        item = new
                    item.key, item.pair, item.place = row["pair_id"], row, place
        for item in items.values():
            item.candidates.sort(key=lambda found: found.number)
        return [each for name, item in items.items() for each in (item, *inner.get(name, []))]

    def _add_scores(
        self, path: Path, images: Mapping[tuple[str, int], Candidate], problems: list[str]
    ) -> None:
        is_metric = path.parent.name == "candidate_scores"
        schema = METRIC_SCORES if is_metric else REWARDS if path.parent.name == "scores" else JUDGED
        names = ["metric", "score"] if is_metric else ["reward", "standard_error"]
        for place, row in self._rows(path, schema, ["prompt_id", "candidate", *names], problems):
            found = images.get((row["prompt_id"], row["candidate"]))
            if found is None:
                continue
            if is_metric:
                found.scores[row["metric"]] = row["score"]
                continue
            found.reward, found.standard_error = row["reward"], row["standard_error"]
            if schema is REWARDS:
                found.errors = place

    def _human(self, _: int, problems: list[str]) -> list[Item]:
        path = self.run / "seed/preferences.parquet"
        return [
            Item(row["pair_id"], row["prompt"], row, place)
            for place, row in self._rows(path, PREFERENCES, FACTS, problems)
        ]

    def _holdout(self, iteration: int, problems: list[str]) -> list[Item]:
        path = self._judged_file(iteration)
        names = ["pair_id", "winner_reward", "loser_reward", "probability"]
        judged = {row["pair_id"]: (place, row)
                  for place, row in self._rows(path, HOLDOUT_REWARDS, names, problems)}  # fmt: skip
        items = []
        held_out = self.run / "seed/holdout.parquet"
        for place, row in self._rows(held_out, *self._held_out_columns(held_out), problems):
            item = Item(row["pair_id"], held_out_prompt(row), row, place)
            if row["pair_id"] in judged:
                item.judged_place, item.judged = judged[row["pair_id"]]
            items.append(item)
        return items


def held_out_prompt(row: Row) -> str:
    """A held-out pair's prompt; of likes side by side the disliked image's too, where it is another one."""
    other = row.pop("loser_prompt", row["prompt"])
    return row["prompt"] if other == row["prompt"] else f"{row['prompt']} (disliked: {other})"


def in_order(paths: Iterator[Path]) -> list[Path]:
    """Files by the numbers in their names: shard-2 before shard-10."""
    return sorted(paths, key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values; numbers by way of NumPy where it can hold them, which is much faster."""
    is_text = pa.types.is_string(column.type)
    return column.to_pylist() if is_text or column.null_count else column.to_numpy().tolist()
