"""Layouts that judge several images of a prompt: N-way rankings, and likes with dislikes.

Both are expanded to pairs: a ranking to every pair of images with different ranks, likes to every
liked image beside every disliked one of the same prompt. Either a row holds a prompt's images as
lists, or each image has a row of its own and rows of one prompt, session and annotator belong
together, in whatever file. An image is never beside itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from stages.core.data.layouts.columns import (
    HELD_OUT,
    find_column,
    group_columns,
    need,
    prompt_column,
)
from stages.core.data.layouts.labels import (
    Cell,
    Key,
    Label,
    Ledger,
    Like,
    check_prompt,
    digest_of,
)
from stages.core.data.layouts.rows import RowLayout
from stages.core.data.layouts.sources import columns_of, read_rows
from stages.core.data.layouts.verdicts import NO, YES, Bad, is_missing, is_no, like, number
from stages.core.data.prompts import normalise
from stages.core.data.text_files import PROBLEM, Record, kind_of
from stages.core.errors import UserError

LISTS = ("images", "image_paths", "file_names")
IMAGE = ("image", "file_name", "path", "image_path", "file_path")
"""A column that holds the image of a row, or in some sets the list of a row's images."""
RANKS = ("ranks", "rank", "ranking")
BEST = ("human_preference",)
"""HPDv2: 1 for the image that was preferred, 0 for the others."""
RANK = ("rank",)
LIKED, DISLIKED = ("liked", "likes", "is_liked"), ("disliked", "dislikes")
KTO = ("label",)


@dataclass(frozen=True, slots=True)
class Judged:
    """One image, with a rank: the smaller, the better."""

    file: Path
    cell: Cell
    rank: float
    digest: int


RankOf = Callable[[str, object], float | None]
"""An image's rank by a column's name and value; None where nobody has judged it."""


@dataclass(frozen=True)
class Judgement:
    """A column that judges images, and how its values are ranks."""

    column: str
    rank_of: RankOf


class Grouped(RowLayout):
    """Files whose rows are judged as lists, or one image a row."""

    def _expand_lists(
        self, file: Path, prompt: str, images: str, judgement: Judgement | None, ledger: Ledger
    ) -> Iterator[Label]:
        """The pairs of each row that holds a list of images; without a judgement their order ranks them."""
        held_out = find_column(columns_of(file), HELD_OUT)
        needs = [*([judgement.column] if judgement else []), *([held_out] if held_out else [])]
        for row, values in read_rows(file, [prompt, images, *needs], with_images=True):
            ledger.counts["rows_read"] += 1
            try:
                _check(values, prompt)
                is_ordered = (
                    self.is_named and judgement is not None and judgement.column not in values
                )
                judged = _ranked(file, row, values, images, None if is_ordered else judgement)
            except Bad as bad:
                ledger.note_bad(file, row, str(bad))
                continue
            if judged is None:
                ledger.counts["unlabelled_dropped"] += 1
                continue
            may_be_held_out = held_out is None or not is_no(values.get(held_out))
            yield from _pairs(values[prompt], judged, ledger, may_be_held_out=may_be_held_out)

    def _expand_groups(
        self, columns_by_file: Mapping[Path, tuple[str, str, Judgement]], ledger: Ledger
    ) -> Iterator[Label]:
        """The pairs of the rows of each prompt, session and annotator, over all files."""
        groups: dict[tuple[object, ...], list[Judged]] = defaultdict(list)
        prompts: dict[str, str] = {}
        for file, (prompt, image, judgement) in columns_by_file.items():
            within = group_columns(columns_of(file), self.columns)
            for values, one in self._judged(file, prompt, image, judgement, within, ledger):
                name = normalise(values[prompt])
                prompts.setdefault(name, values[prompt])
                group: tuple[object, ...] = (name, *(str(values.get(column)) for column in within))
                groups[group].append(one)
        for whole in list(groups):  # what has become pairs need not stay in memory
            judged = groups.pop(whole)
            if len({image.rank for image in judged}) < 2:
                ledger.counts["images_without_counterpart"] += len(judged)
            yield from _pairs(prompts[str(whole[0])], judged, ledger)

    def _judged(
        self, file: Path, prompt: str, image: str, judgement: Judgement, others: Sequence[str],
        ledger: Ledger,
    ) -> Iterator[tuple[Record, Judged]]:  # fmt: skip
        """Each row whose one image was judged: its prompt and `others`, and the image."""
        columns = [prompt, image, judgement.column, *others]
        for row, values in read_rows(file, columns, with_images=True):
            ledger.counts["rows_read"] += 1
            try:
                _check(values, prompt)
                rank = judgement.rank_of(judgement.column, values.get(judgement.column))
            except Bad as bad:
                ledger.note_bad(file, row, str(bad))
                continue
            if rank is None:
                ledger.counts["unlabelled_dropped"] += 1
                continue
            yield values, Judged(file, Cell(row, image), rank, digest_of(values.get(image)))


class Rankings(Grouped):
    """N images of a prompt in an order; images of one rank are a tie."""

    name = "rankings"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """Every pair of images with different ranks.

        A list of images is ranked by a column of ranks. Only where the user names this layout, and a
        row has no such column, is its order the ranking.
        """
        columns_by_file: dict[Path, tuple[str, str, Judgement]] = {}
        for file in self.files:
            names = columns_of(file)
            self.columns.check(file, names)
            prompt = prompt_column(file, names, self.columns)
            images, judgement = self._list_of(file, names)
            if images:
                if judgement is None and not self.is_named:
                    raise UserError(f"{file}: {not_ranked(images, names)}")
                yield from self._expand_lists(file, prompt, images, judgement, ledger)
            else:
                image = self.columns.image or need(file, names, IMAGE)
                found = self._named() or Judgement(need(file, names, RANK), _rank_of)
                columns_by_file[file] = (prompt, image, found)
        yield from self._expand_groups(columns_by_file, ledger)

    def _list_of(self, file: Path, names: Sequence[str]) -> tuple[str | None, Judgement | None]:
        """The column of lists of images, if a file has one, and what ranks them."""
        if self.columns.image:
            is_list = holds_lists(file, self.columns.image)
            return (self.columns.image, self._named()) if is_list else (None, None)
        images = list_column(file, names)
        return images, list_judgement(names) if images else None

    def _named(self) -> Judgement | None:
        if self.columns.rank:
            return Judgement(self.columns.rank, _rank_of)
        if self.columns.score:
            return Judgement(self.columns.score, _rank_of_score)
        return None


class Likes(Grouped):
    """Images of a prompt that were liked or disliked."""

    name = "likes"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """Every liked image of a prompt beside every disliked one."""
        columns_by_file: dict[Path, tuple[str, str, Judgement]] = {}
        for file in self.files:
            if sides := self._sides(file):
                for prompt, judged in self._rows_of_sides(file, *sides, ledger):
                    yield from _pairs(prompt, judged, ledger)
            else:
                columns_by_file[file] = self._single(file)
        yield from self._expand_groups(columns_by_file, ledger)

    def likes(self, ledger: Ledger) -> Iterator[Like]:
        """Every image by itself, with what was said of it."""
        for file in self.files:
            if sides := self._sides(file):
                for text, several in self._rows_of_sides(file, *sides, ledger):
                    yield from (_like(text, one) for one in several)
            else:
                prompt, image, judgement = self._single(file)
                for values, one in self._judged(file, prompt, image, judgement, (), ledger):
                    yield _like(values[prompt], one)

    def _sides(self, file: Path) -> tuple[str, str, str] | None:
        """The columns of the prompt, the liked and the disliked images, where rows list them."""
        names = columns_of(file)
        self.columns.check(file, names)
        disliked = None if self.columns.like else find_column(names, DISLIKED)
        if disliked is None:
            return None
        return prompt_column(file, names, self.columns), need(file, names, LIKED), disliked

    def _single(self, file: Path) -> tuple[str, str, Judgement]:
        """The columns of the prompt, the image and its label, where each image has a row of its own."""
        names = columns_of(file)
        prompt = prompt_column(file, names, self.columns)
        image = self.columns.image or need(file, names, IMAGE)
        liked = self.columns.like or find_column(names, LIKED) or need(file, names, KTO)
        return prompt, image, Judgement(liked, _rank_of_like)

    def _rows_of_sides(
        self, file: Path, prompt: str, liked: str, disliked: str, ledger: Ledger
    ) -> Iterator[tuple[str, list[Judged]]]:
        """The prompt and the images of each row that lists liked and disliked ones."""
        for row, values in read_rows(file, [prompt, liked, disliked], with_images=True):
            ledger.counts["rows_read"] += 1
            try:
                _check(values, prompt)
                judged = [
                    Judged(file, Cell(row, side, place), float(rank), digest_of(image))
                    for rank, side in enumerate((liked, disliked))
                    for place, image in enumerate(_list(values, side))
                ]
            except Bad as bad:
                ledger.note_bad(file, row, str(bad))
                continue
            yield values[prompt], judged


def _like(prompt: str, judged: Judged) -> Like:
    return Like(judged.file, prompt, judged.cell, judged.rank == 0, judged.digest)


def list_column(file: Path, names: Sequence[str]) -> str | None:
    """The column that holds a prompt's images as a list; a cell of .csv or .tsv holds one image."""
    if found := find_column(names, LISTS):
        return found if kind_of(file) not in (".csv", ".tsv") else None
    found = find_column(names, IMAGE)
    return found if found and holds_lists(file, found) else None


def holds_lists(file: Path, column: str) -> bool:
    """Whether the first cell of a column that is not empty holds a list."""
    if kind_of(file) in (".csv", ".tsv", ".tar"):
        return False
    for _row, values in read_rows(file, [column], with_images=True):
        value = values.get(column)
        if value is not None:
            return isinstance(value, list)
    return False


def list_judgement(names: Sequence[str]) -> Judgement | None:
    """The column that ranks lists of images; None if there is none that is known to."""
    if ranks := find_column(names, RANKS):
        return Judgement(ranks, _rank_of)
    if best := find_column(names, BEST):
        return Judgement(best, _rank_of_score)
    return None


def not_ranked(images: str, names: Sequence[str]) -> str:
    """Why a list of images is no ranking."""
    return (
        f"{images!r} lists images, and no column is known to rank them (found: {', '.join(names)}). Name "
        f"it, as preferences.columns: {{image: {images}, rank: ...}} or {{image: {images}, score: ...}}; "
        "if the lists go from best to worst, say so with preferences.layout: rankings"
    )


def _pairs(
    prompt: str, judged: Sequence[Judged], ledger: Ledger, *, may_be_held_out: bool = True
) -> Iterator[Label]:
    for one, other in combinations(judged, 2):
        if one.digest == other.digest:
            ledger.counts["same_image_dropped"] += 1
            continue
        if one.rank == other.rank:
            ledger.counts["ties_dropped"] += 1
            continue
        winner, loser = sorted((one, other), key=lambda image: image.rank)
        images = winner.digest, loser.digest
        key = Key(True, 0, digest_of(*images))
        yield Label(
            winner.file, winner.cell.row, prompt, winner.cell, loser.cell, key, images, loser.file,
            may_be_held_out,
        )  # fmt: skip


def _ranked(
    file: Path, row: int, values: Record, images: str, judgement: Judgement | None
) -> list[Judged] | None:
    """The images of a row with their ranks, by their order without a judgement; None if nobody ranked."""
    if judgement is not None and values.get(judgement.column) is None:
        return None
    found = _list(values, images)
    ranks: list[float | None]
    if judgement is None:
        ranks = [float(place) for place in range(len(found))]
    else:
        given = _list(values, judgement.column)
        if len(given) != len(found):
            raise Bad(
                f"{images!r} lists {len(found)} images and {judgement.column!r} {len(given)} ranks"
            )
        ranks = [judgement.rank_of(judgement.column, rank) for rank in given]
    if len(found) < 2:
        raise Bad(f"{images!r} lists {len(found)} images; a ranking needs 2 or more")
    return [
        Judged(file, Cell(row, images, place), rank, digest_of(image))
        for place, (image, rank) in enumerate(zip(found, ranks, strict=True))
        if rank is not None
    ]


def _rank_of(column: str, value: object) -> float:
    return number(column, value, "a number, 1 for the best image")


def _rank_of_score(column: str, value: object) -> float | None:
    return None if is_missing(value) else -number(column, value)


def _rank_of_like(column: str, value: object) -> float:
    return float(not like(column, value))


def _list(values: Mapping[str, Any], column: str) -> list[Any]:
    value = values.get(column)
    if not isinstance(value, list):
        raise Bad(f"{column!r} is {value!r}; expected a list")
    return value


def _check(values: Record, prompt: str) -> None:
    problem = values.get(PROBLEM) or check_prompt(values.get(prompt))
    if problem:
        raise Bad(problem)


def are_likes(file: Path, column: str) -> bool:
    """Whether all values of a column say yes or no; one or two numbers of a count do not make likes."""
    words = set()
    for _row, values in read_rows(file, [column], with_images=False):
        if not is_missing(values.get(column)):
            words.add(str(values.get(column)).strip().lower().removesuffix(".0"))
    return bool(words) and words <= {*YES, *NO}
