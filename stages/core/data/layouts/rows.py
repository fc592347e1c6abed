"""Layouts with one row a judgement: Pick-a-Pic's columns, a prompt with a chosen image, two compared ones.

Rows are those of Parquet files, Arrow streams, CSV, TSV, JSON and JSON lines, or webdatasets; images
are bytes, `{bytes, path}`, or paths of files beside the file that names them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any

from stages.core.data.layouts.columns import HELD_OUT, find_column, find_sides, need, prompt_column
from stages.core.data.layouts.labels import (
    Cell,
    FoundImage,
    Key,
    Label,
    Layout,
    Ledger,
    check_prompt,
    digest_of,
)
from stages.core.data.layouts.sources import Folder, columns_of, read_cell, read_rows
from stages.core.data.layouts.verdicts import (
    Bad,
    Verdict,
    by_name,
    by_probability,
    by_scores,
    is_missing,
    is_no,
    names_of,
)
from stages.core.data.text_files import PROBLEM, Record
from stages.core.errors import UserError

CHOSEN = ("chosen", "winner", "chosen_file_name", "winner_file_name")
REJECTED = ("rejected", "loser", "rejected_file_name", "loser_file_name")
LABELS = ("label_0", "label_1")
SIDES = (("jpg_0", "image_0"), ("jpg_1", "image_1"))
UIDS = ("image_0_uid", "image_1_uid")
WINNER = ("winner", "better", "preferred", "preferred_image", "choice")


class RowLayout(Layout):
    """Files of rows whose images have no uid."""

    def images(self, file: Path, cells: Collection[Cell]) -> Iterator[FoundImage]:
        """The images, with the uids of the makers where there are such."""
        yield from row_images(file, cells, self.uids(file), self.folder_of(file))

    def uids(self, file: Path) -> dict[str, str]:
        """The column of the uid of each column of images."""
        return {}


@dataclass(frozen=True)
class Compared:
    """How a table's row says which of two images is the better one."""

    prompt: str
    sides: tuple[str, str]
    identity: tuple[str, str] | None
    """Columns that tell the two images from others; None where only their bytes would."""
    verdict: Callable[[Record], Verdict]
    """Bad where a row's verdict cannot be read for certain."""
    needs: tuple[str, ...]
    """Columns that the verdict is read from."""
    key: tuple[str, ...]
    """Columns that name the row."""


class TwoSided(RowLayout):
    """Two images a row, one of which may be the better one; ties and unlabelled rows are counted."""

    @abstractmethod
    def compared(self, file: Path, names: Sequence[str]) -> Compared:
        """How this file's rows are read. UserError if they cannot be."""

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """The rows with a winner."""
        for file in self.files:
            names = columns_of(file)
            self.columns.check(file, names)
            held_out = find_column(names, HELD_OUT)
            yield from self._labels_of(file, self.compared(file, names), held_out, ledger)

    def _labels_of(
        self, file: Path, how: Compared, held_out: str | None, ledger: Ledger
    ) -> Iterator[Label]:
        is_read = how.identity is not None and how.identity != how.sides
        identity = how.identity or ()
        marks = [held_out] if held_out else []
        columns = dict.fromkeys([how.prompt, *how.needs, *identity, *how.key, *marks])
        for row, values in read_rows(file, list(columns), with_images=not is_read):
            ledger.counts["rows_read"] += 1
            try:
                if PROBLEM in values:
                    raise Bad(values[PROBLEM])
                verdict = how.verdict(values)
                if verdict == "none":
                    ledger.counts["unlabelled_dropped"] += 1
                    continue
                if problem := check_prompt(values.get(how.prompt)):
                    raise Bad(problem)
            except Bad as bad:
                ledger.note_bad(file, row, str(bad))
                continue
            if verdict == "tie":
                ledger.counts["ties_dropped"] += 1
                continue
            better = int(verdict == "b")
            key = _key(values, how.key, better)
            yield Label(
                file,
                row,
                intern(values[how.prompt]),
                Cell(row, how.sides[better]),
                Cell(row, how.sides[1 - better]),
                key,
                _images(values, how.identity, better, key),
                may_be_held_out=held_out is None or not is_no(values.get(held_out)),
            )


class Pickapic(TwoSided):
    """Two images and two labels a row, as in Pick-a-Pic v2."""

    name = "pickapic"

    def compared(self, file: Path, names: Sequence[str]) -> Compared:
        """The columns of Pick-a-Pic."""
        sides = (need(file, names, SIDES[0]), need(file, names, SIDES[1]))
        labels = (need(file, names, LABELS[:1]), need(file, names, LABELS[1:]))
        ranking = find_column(names, ["ranking_id"])
        flag = find_column(names, ["has_label"])
        uids = [find_column(names, [uid]) for uid in UIDS]
        named = (uids[0], uids[1]) if uids[0] and uids[1] else None
        if named is not None:
            identity: tuple[str, str] | None = named
        else:
            identity = None if ranking else sides
        key = [name for name in (ranking, *uids) if name] if ranking or named else list(sides)

        def verdict(values: Record) -> Verdict:
            if flag and is_no(values.get(flag)):
                return "none"
            found = tuple(values.get(name) for name in labels)
            numbers = tuple(map(_number, found))
            if numbers == (0.5, 0.5):
                return "tie"
            if numbers not in ((1, 0), (0, 1)):
                shown = [value if number is None else number
                         for value, number in zip(found, numbers, strict=True)]  # fmt: skip
                raise Bad(
                    f"label_0, label_1 = {shown[0]}, {shown[1]}; expected 1, 0 (image 0 wins), 0, 1 "
                    "(image 1 wins) or 0.5, 0.5 (a tie); preferences.columns reads scores and soft "
                    "labels"
                )
            return "a" if numbers == (1, 0) else "b"

        needs = (*labels, *([flag] if flag else []))
        prompt = need(file, names, ("caption", "prompt"))
        return Compared(prompt, sides, identity, verdict, needs, tuple(key))

    def uids(self, file: Path) -> dict[str, str]:
        """The columns of Pick-a-Pic."""
        names = columns_of(file)
        found = [(need(file, names, side), find_column(names, [uid]))
                 for side, uid in zip(SIDES, UIDS, strict=True)]  # fmt: skip
        return {side: uid for side, uid in found if uid}


class Comparisons(TwoSided):
    """Two images a row, and a column (or two) that says which is the better one."""

    name = "comparisons"

    def compared(self, file: Path, names: Sequence[str]) -> Compared:
        """The columns that the user named, or those of a set that is known. UserError otherwise."""
        sides = (self.columns.image_a, self.columns.image_b)
        named = (sides[0], sides[1]) if sides[0] and sides[1] else find_sides(names)
        if named is None:
            raise UserError(f"{file} has no two columns of images; {NAME_THEM}")
        prompt = prompt_column(file, names, self.columns)
        judge = _named_judge(self.columns, named) or known_judge(names, named)
        if judge is None:
            raise UserError(
                f"{file} has two images a row ({', '.join(named)}), and no column that is known to say "
                f"which one is better (found: {', '.join(names)}); {NAME_THEM}"
            )
        verdict, needs = judge
        uids = (self.columns.uid_a, self.columns.uid_b)
        identity = (uids[0], uids[1]) if uids[0] and uids[1] else named
        return Compared(prompt, named, identity, verdict, needs, named)

    def uids(self, file: Path) -> dict[str, str]:
        """The columns that the user named."""
        found = find_sides(columns_of(file)) or ("", "")
        sides = (self.columns.image_a or found[0], self.columns.image_b or found[1])
        uids = (self.columns.uid_a, self.columns.uid_b)
        return {side: uid for side, uid in zip(sides, uids, strict=True) if uid}


NAME_THEM = (
    "say it with preferences.columns, as {prompt: caption, image_a: left, image_b: right, winner: vote} "
    "(docs/own-labels.md)"
)

Judge = tuple[Callable[[Record], Verdict], tuple[str, ...]]
"""What reads a row's verdict, and the columns that it reads."""


def _named_judge(columns: Any, sides: tuple[str, str]) -> Judge | None:
    """The verdict that the user names."""
    if columns.winner:
        return _winner(columns.winner, sides, columns.winner_a, columns.winner_b)
    if columns.score_a and columns.score_b:
        return _scores((columns.score_a, columns.score_b), columns.tie_below)
    if columns.probability_a:
        name, below = columns.probability_a, columns.tie_below
        return lambda values: by_probability(name, values.get(name), below), (name,)
    return None


def known_judge(names: Sequence[str], sides: tuple[str, str]) -> Judge | None:
    """The verdict of public sets and tools, by their columns; None where a column could mean anything."""
    lower = [side.lower() for side in sides]
    votes = [find_column(names, [f"votes_{side}"]) for side in lower]
    if votes[0] and votes[1]:  # Rapidata
        return _scores((votes[0], votes[1]), 0.0)
    if lower == ["path1", "path2"] and find_column(names, ("confidence", "choice_dist")):
        return (lambda values: "a"), ()  # HPDv3: path1 is the preferred one
    label = find_column(names, ["label"])
    if lower == ["image0", "image1"] and label:  # MJ-Bench: the number of the better one
        return _winner(label, sides, None, None)
    if winner := find_column(names, WINNER):
        return _winner(winner, sides, None, None)
    answers = [name for name in names if name.lower().endswith(".responses")]
    if len(answers) == 1:  # Argilla's records: what each annotator answered
        return _winner(answers[0], sides, None, None)
    if find_column(names, ["id"]) and find_column(names, ("annotator", "annotation_id")):
        return _label_studio(names, sides)
    return None


def _label_studio(names: Sequence[str], sides: tuple[str, str]) -> Judge | None:
    """Label Studio's small exports: the control's own column says left or right."""
    usual = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "prompt",
             "caption", "text", *map(str.lower, sides)}  # fmt: skip
    others = [name for name in names if name.lower() not in usual]
    if len(others) != 1:
        return None
    return _winner(others[0], sides, "left", "right")


def _winner(name: str, sides: tuple[str, str], first: str | None, second: str | None) -> Judge:
    names = names_of(*sides)
    if first is not None or second is not None:
        own: dict[str, Verdict] = {}
        if first is not None:
            own[first.strip().lower()] = "a"
        if second is not None:
            own[second.strip().lower()] = "b"
        names = own
    return lambda values: by_name(name, values.get(name), names), (name,)


def _scores(names: tuple[str, str], tie_below: float) -> Judge:
    return lambda values: by_scores(
        names, (values.get(names[0]), values.get(names[1])), tie_below
    ), names


class Pairs(RowLayout):
    """A prompt, a chosen and a rejected image a row, or lists of such."""

    name = "pairs"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """Every row; of lists each chosen image beside each rejected one."""
        for file in self.files:
            names = columns_of(file)
            self.columns.check(file, names)
            prompt = prompt_column(file, names, self.columns)
            chosen = self.columns.chosen or need(file, names, CHOSEN)
            rejected = self.columns.rejected or need(file, names, REJECTED)
            for row, values in read_rows(file, [prompt, chosen, rejected], with_images=True):
                ledger.counts["rows_read"] += 1
                problem = values.get(PROBLEM) or check_prompt(values.get(prompt))
                if problem:
                    ledger.note_bad(file, row, problem)
                    continue
                better, worse = _several(values, chosen), _several(values, rejected)
                if not better or not worse:
                    name = rejected if better else chosen
                    ledger.note_bad(file, row, "the image has no bytes", name)
                    continue
                for place, winner in enumerate(better):
                    for other, loser in enumerate(worse):
                        images = digest_of(winner), digest_of(loser)
                        yield Label(
                            file,
                            row,
                            values[prompt],
                            Cell(row, chosen, place),
                            Cell(row, rejected, other),
                            Key(True, 0, digest_of(winner, loser, 0)),
                            images,
                        )


def _several(values: Record, column: str) -> list[Any]:
    value = values.get(column)
    return value if isinstance(value, list) else [value]


def row_images(
    file: Path, cells: Collection[Cell], uids: dict[str, str], folder: Folder
) -> Iterator[FoundImage]:
    """The images of some cells of a file of rows; `uids` names the column of each column's uid."""
    for name in sorted({cell.column for cell in cells}):  # one column's pages in memory at a time
        by_row: dict[int, list[Cell]] = defaultdict(list)
        for cell in cells:
            if cell.column == name:
                by_row[cell.row].append(cell)
        columns = [name, uids[name]] if name in uids else [name]
        for row, values in read_rows(file, columns, with_images=True, only=by_row):
            for cell in sorted(by_row[row]):
                value = values.get(name)
                if isinstance(value, list):
                    value = value[cell.position] if cell.position < len(value) else None
                data, problem = read_cell(value, folder)
                uid = values.get(uids[name]) if name in uids else None
                yield FoundImage(file, cell, data, str(uid) if uid else None, problem)


def _key(values: Record, identity: Sequence[str], winner: int) -> Key:
    number = next((values.get(name) for name in identity if name.lower() == "ranking_id"), None)
    digest = digest_of(*(values.get(name) for name in identity), winner)
    return Key(not isinstance(number, int), number if isinstance(number, int) else 0, digest)


def _images(
    values: Record, identity: tuple[str, str] | None, winner: int, key: Key
) -> tuple[int, int]:
    """What the two images are; where nothing tells, images of this row alone."""
    if identity is None or any(is_missing_image(values.get(name)) for name in identity):
        return digest_of(*key, "winner"), digest_of(*key, "loser")
    return digest_of(values[identity[winner]]), digest_of(values[identity[1 - winner]])


def is_missing_image(value: object) -> bool:
    """Whether a cell names no image."""
    return value is None or (isinstance(value, str) and is_missing(value))


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return float(value.strip().lower() == "true")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
