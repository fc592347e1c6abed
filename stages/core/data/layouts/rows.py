"""Layouts with one row a judgement: Pick-a-Pic's columns, and a prompt with a chosen image.

Rows are those of Parquet files, Arrow streams, CSV, TSV, JSON and JSON lines, or webdatasets; images
are bytes, `{bytes, path}`, or paths of files beside the file that names them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from sys import intern
from typing import Any

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
from stages.core.data.layouts.sources import columns_of, read_cell, read_rows
from stages.core.data.prompts import PROMPT_COLUMNS
from stages.core.data.text_files import PROBLEM, Record
from stages.core.errors import UserError

CHOSEN = ("chosen", "winner", "chosen_file_name", "winner_file_name")
REJECTED = ("rejected", "loser", "rejected_file_name", "loser_file_name")
LABELS = ("label_0", "label_1")
SIDES = (("jpg_0", "image_0"), ("jpg_1", "image_1"))
UIDS = ("image_0_uid", "image_1_uid")
NO_LABEL = (False, "false", "False", "0", 0)


class Pickapic(Layout):
    """Two images and two labels a row, as in Pick-a-Pic v2; ties and unlabelled rows are counted."""

    name = "pickapic"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """The rows with a winner."""
        for file in self.files:
            names = columns_of(file)
            sides = [need(file, names, side) for side in SIDES]
            prompt = need(file, names, ("caption", "prompt"))
            labels = [need(file, names, (label,)) for label in LABELS]
            ids = [name for name in ("ranking_id", *UIDS) if name in names]
            is_named = "ranking_id" in ids or len(ids) == 2
            identity = ids if is_named else sides
            flag = ["has_label"] if "has_label" in names else []
            columns = list(dict.fromkeys([prompt, *labels, *flag, *identity]))
            for row, values in read_rows(file, columns, with_images=not is_named):
                ledger.counts["rows_read"] += 1
                if flag and values.get("has_label") in NO_LABEL and PROBLEM not in values:
                    ledger.counts["unlabelled_dropped"] += 1
                    continue
                found = tuple(_number(values.get(name)) for name in labels)
                problem = values.get(PROBLEM) or check_prompt(values.get(prompt))
                if problem is None and found not in ((1, 0), (0, 1), (0.5, 0.5)):
                    problem = (
                        f"label_0, label_1 = {found[0]}, {found[1]}; expected 1, 0 (image 0 "
                        "wins), 0, 1 (image 1 wins) or 0.5, 0.5 (a tie)"
                    )
                if problem:
                    ledger.note_bad(file, row, problem)
                elif found == (0.5, 0.5):
                    ledger.counts["ties_dropped"] += 1
                else:
                    winner = int(found == (0, 1))
                    yield Label(
                        file,
                        row,
                        intern(values[prompt]),
                        Cell(row, sides[winner]),
                        Cell(row, sides[1 - winner]),
                        _key(values, identity, winner),
                    )

    def images(self, file: Path, cells: Collection[Cell]) -> Iterator[FoundImage]:
        """The images, with the uids of the makers."""
        names = columns_of(file)
        uids = {
            need(file, names, side): uid
            for side, uid in zip(SIDES, UIDS, strict=True)
            if uid in names
        }
        yield from row_images(file, cells, uids)


class RowLayout(Layout):
    """Files of rows whose images have no uid."""

    def images(self, file: Path, cells: Collection[Cell]) -> Iterator[FoundImage]:
        """The images."""
        yield from row_images(file, cells, {})


class Pairs(RowLayout):
    """A prompt, a chosen and a rejected image a row."""

    name = "pairs"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """Every row."""
        for file in self.files:
            names = columns_of(file)
            prompt = need(file, names, PROMPT_COLUMNS)
            sides = [need(file, names, CHOSEN), need(file, names, REJECTED)]
            for row, values in read_rows(file, [prompt, *sides], with_images=True):
                ledger.counts["rows_read"] += 1
                problem = values.get(PROBLEM) or check_prompt(values.get(prompt))
                if problem:
                    ledger.note_bad(file, row, problem)
                    continue
                yield Label(
                    file,
                    row,
                    values[prompt],
                    Cell(row, sides[0]),
                    Cell(row, sides[1]),
                    _key(values, sides, 0),
                )


def row_images(file: Path, cells: Collection[Cell], uids: dict[str, str]) -> Iterator[FoundImage]:
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
                data, problem = read_cell(value, file.parent)
                uid = values.get(uids.get(name, ""))
                yield FoundImage(file, cell, data, str(uid) if uid else None, problem)


def find_column(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first wanted name that there is, in whatever case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[want] for want in wanted if want in lower), None)


def need(file: Path, names: Sequence[str], wanted: Sequence[str]) -> str:
    """The first wanted column that there is. UserError if none is there."""
    found = find_column(names, wanted)
    if found is None:
        raise UserError(
            f"{file} has no column {' or '.join(map(repr, wanted[:1]))} (found: "
            f"{', '.join(names)}); docs/own-labels.md shows the columns of every layout"
        )
    return found


def _key(values: Record, identity: Sequence[str], winner: int) -> Key:
    number = values.get("ranking_id")
    digest = digest_of(*(values.get(name) for name in identity), winner)
    return Key(not isinstance(number, int), number if isinstance(number, int) else 0, digest)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
