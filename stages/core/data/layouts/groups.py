"""Layouts that judge several images of a prompt: N-way rankings, and likes with dislikes.

Both are expanded to pairs: a ranking to every pair of images with different ranks, likes to every
liked image beside every disliked one of the same prompt. Either a row holds a prompt's images as
lists, or each image has a row of its own and rows of one prompt belong together, in whatever file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from stages.core.data.layouts.labels import Cell, Key, Label, Ledger, check_prompt, digest_of
from stages.core.data.layouts.rows import RowLayout, find_column, need
from stages.core.data.layouts.sources import columns_of, read_rows
from stages.core.data.prompts import PROMPT_COLUMNS, normalise
from stages.core.data.text_files import PROBLEM, Record

IMAGES = ("images", "image_paths", "image_path", "file_path", "file_names")
IMAGE = ("image", "file_name", "path", "image_path", "file_path")
RANKS = ("ranks", "rank", "ranking")
RANK = ("rank",)
LIKED, DISLIKED = ("liked", "likes"), ("disliked", "dislikes")
YES, NO = ("1", "true", "yes", "like"), ("0", "false", "no", "dislike")


@dataclass(frozen=True, slots=True)
class Judged:
    """One image, with a rank: the smaller, the better."""

    file: Path
    cell: Cell
    rank: float
    digest: int


Judge = Callable[[Path, int, Record], list[Judged]]
RankOf = Callable[[str, object], float]


class Bad(Exception):
    """A row that cannot be used; the message says why."""


class Rankings(RowLayout):
    """N images of a prompt in an order; images of one rank are a tie."""

    name = "rankings"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """Every pair of images with different ranks."""
        columns_by_file: dict[Path, list[str]] = {}
        for file in self.files:
            names = columns_of(file)
            prompt = need(file, names, PROMPT_COLUMNS)
            images, image = list_column(file, names), find_column(names, IMAGE)
            if images:
                ranks = find_column(names, RANKS)
                columns = [prompt, images, *([ranks] if ranks else [])]
                yield from _expand_rows(file, columns, ledger, partial(_ranked, images, ranks))
            else:
                one, rank = image or need(file, names, IMAGE), need(file, names, RANK)
                columns_by_file[file] = [prompt, one, rank]
        yield from _expand_groups(columns_by_file, ledger, _rank_of)


class Likes(RowLayout):
    """Images of a prompt that were liked or disliked."""

    name = "likes"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """Every liked image of a prompt beside every disliked one."""
        columns_by_file: dict[Path, list[str]] = {}
        for file in self.files:
            names = columns_of(file)
            prompt, liked = need(file, names, PROMPT_COLUMNS), need(file, names, LIKED)
            disliked, image = find_column(names, DISLIKED), find_column(names, IMAGE)
            if disliked:
                sides = (liked, disliked)
                yield from _expand_rows(file, [prompt, *sides], ledger, partial(_liked, sides))
            else:
                one = image or need(file, names, IMAGE)
                columns_by_file[file] = [prompt, one, liked]
        yield from _expand_groups(columns_by_file, ledger, _like_of)


def _expand_rows(
    file: Path, columns: Sequence[str], ledger: Ledger, judge: Judge
) -> Iterator[Label]:
    """The pairs of each row that holds lists."""
    for row, values in read_rows(file, columns, with_images=True):
        ledger.counts["rows_read"] += 1
        try:
            _check(values, columns[0])
            yield from _pairs(values[columns[0]], judge(file, row, values), ledger)
        except Bad as bad:
            ledger.note_bad(file, row, str(bad))


def _expand_groups(
    columns_by_file: Mapping[Path, Sequence[str]], ledger: Ledger, rank_of: RankOf
) -> Iterator[Label]:
    """The pairs of the rows of each prompt, over all files."""
    groups: dict[str, list[Judged]] = defaultdict(list)
    prompts: dict[str, str] = {}
    for file, (prompt, image, judgement) in columns_by_file.items():
        for row, values in read_rows(file, (prompt, image, judgement), with_images=True):
            ledger.counts["rows_read"] += 1
            try:
                _check(values, prompt)
                rank = rank_of(judgement, values.get(judgement))
            except Bad as bad:
                ledger.note_bad(file, row, str(bad))
                continue
            name = normalise(values[prompt])
            prompts.setdefault(name, values[prompt])
            digest = digest_of(values.get(image))
            groups[name].append(Judged(file, Cell(row, image), rank, digest))
    for name in list(groups):  # what has become pairs need not stay in memory
        yield from _pairs(prompts.pop(name), groups.pop(name), ledger)


def _pairs(prompt: str, judged: Sequence[Judged], ledger: Ledger) -> Iterator[Label]:
    for one, other in combinations(judged, 2):
        if one.rank == other.rank:
            ledger.counts["ties_dropped"] += 1
            continue
        winner, loser = sorted((one, other), key=lambda image: image.rank)
        key = Key(True, 0, digest_of(winner.digest, loser.digest))
        yield Label(winner.file, winner.cell.row, prompt, winner.cell, loser.cell, key, loser.file)


def _ranked(images: str, ranks: str | None, file: Path, row: int, values: Record) -> list[Judged]:
    found = _list(values, images)
    has_ranks = ranks is not None and values.get(ranks) is not None
    order = _list(values, str(ranks)) if has_ranks else list(range(len(found)))
    if len(order) != len(found):
        raise Bad(f"{images!r} lists {len(found)} images and {ranks!r} {len(order)} ranks")
    if len(found) < 2:
        raise Bad(f"{images!r} lists {len(found)} images; a ranking needs 2 or more")
    return [
        Judged(file, Cell(row, images, place), _rank_of(ranks or "", rank), digest_of(image))
        for place, (image, rank) in enumerate(zip(found, order, strict=True))
    ]


def _liked(sides: tuple[str, str], file: Path, row: int, values: Record) -> list[Judged]:
    return [
        Judged(file, Cell(row, side, place), float(rank), digest_of(image))
        for rank, side in enumerate(sides)
        for place, image in enumerate(_list(values, side))
    ]


def _rank_of(column: str, value: object) -> float:
    try:
        rank = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        rank = float("nan")
    if rank != rank:
        raise Bad(f"{column!r} is {value!r}; expected a number, 1 for the best image")
    return rank


def _like_of(column: str, value: object) -> float:
    word = str(value).strip().lower().removesuffix(".0")
    if word not in (*YES, *NO):
        raise Bad(f"{column!r} is {value!r}; expected 1 (liked) or 0 (disliked)")
    return float(word in NO)


def _list(values: Mapping[str, Any], column: str) -> list[Any]:
    value = values.get(column)
    if not isinstance(value, list):
        raise Bad(f"{column!r} is {value!r}; expected a list")
    return value


def _check(values: Record, prompt: str) -> None:
    problem = values.get(PROBLEM) or check_prompt(values.get(prompt))
    if problem:
        raise Bad(problem)


def list_column(file: Path, names: Sequence[str]) -> str | None:
    """The column that holds a prompt's images as a list; a cell of .csv or .tsv holds one image."""
    return None if file.suffix in (".csv", ".tsv") else find_column(names, IMAGES)
