"""Label Studio's JSON export of pairwise tasks: `data` with two images, `annotations` that select one.

The small exports (JSON-MIN, CSV) are tables of two images and a word, which `comparisons` reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stages.core.data.layouts.columns import find_column, find_sides
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
from stages.core.data.layouts.sources import read_cell, read_rows
from stages.core.data.layouts.verdicts import Bad
from stages.core.data.prompts import PROMPT_COLUMNS
from stages.core.data.text_files import PROBLEM, Record

COLUMNS = ("data", "annotations")


class LabelStudio(Layout):
    """Tasks of Label Studio's <Pairwise> tag, each with the answers of one or more people."""

    name = "labelstudio"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """A label for each answer."""
        for file in self.files:
            for row, values in read_rows(file, COLUMNS, with_images=True):
                ledger.counts["rows_read"] += 1
                try:
                    yield from self._of_task(file, row, values, ledger)
                except Bad as bad:
                    ledger.note_bad(file, row, str(bad))

    def images(self, file: Path, cells: Collection[Cell]) -> Iterator[FoundImage]:
        """The images, whose addresses in Label Studio are paths on the disk that it serves."""
        wanted = {cell.row for cell in cells}
        for row, values in read_rows(file, COLUMNS, with_images=True, only=wanted):
            for cell in sorted(cell for cell in cells if cell.row == row):
                value = (values.get("data") or {}).get(cell.column)
                data, problem = read_cell(local_path(value), self.folder_of(file))
                yield FoundImage(file, cell, data, None, problem)

    def _of_task(self, file: Path, row: int, values: Record, ledger: Ledger) -> Iterator[Label]:
        if PROBLEM in values:
            raise Bad(values[PROBLEM])
        data, annotations = values.get("data"), values.get("annotations")
        if not isinstance(data, dict) or not isinstance(annotations, list):
            raise Bad("expected a task's 'data' and a list 'annotations'")
        prompt, sides = find_column(list(data), PROMPT_COLUMNS), find_sides(list(data))
        if prompt is None or sides is None:
            raise Bad(f"its data has the keys {', '.join(data)}; expected a prompt and two images")
        if problem := check_prompt(data[prompt]):
            raise Bad(problem)
        answers = [answer for one in annotations for answer in _answers(one, sides)]
        if not answers:
            ledger.counts["unlabelled_dropped"] += 1
        for number, answer in enumerate(answers):
            if answer is None:
                ledger.counts["ties_dropped"] += 1
                continue
            winner, loser = sides[answer], sides[1 - answer]
            images = digest_of(data[winner]), digest_of(data[loser])
            yield Label(
                file,
                row,
                data[prompt],
                Cell(row, winner),
                Cell(row, loser),
                Key(True, 0, digest_of(*images, number)),
                images,
            )


def local_path(value: Any) -> Any:
    """The path in an address that Label Studio serves a local file under; other values as they are."""
    if isinstance(value, str) and value.startswith("/data/local-files/"):
        return parse_qs(urlsplit(value).query).get("d", [value])[0]
    return value


def _answers(annotation: Any, sides: tuple[str, str]) -> Iterator[int | None]:
    """What an annotation selects: 0 or 1 for a side, None for neither. Bad for any other word.

    Left is the first of the names that the tag compares, where the answer keeps them.
    """
    if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
        return
    for result in annotation.get("result") or []:
        if not isinstance(result, dict) or result.get("type") != "pairwise":
            continue
        selected = (result.get("value") or {}).get("selected")
        if selected not in ("left", "right"):
            if selected in (None, "", "none", "tie"):
                yield None
                continue
            raise Bad(f"an annotation selects {selected!r}; expected 'left' or 'right'")
        order = result.get("to_name")
        names = order.split(",") if isinstance(order, str) else []
        is_turned = [name.strip() for name in names] == [sides[1], sides[0]]
        yield int((selected == "right") != is_turned)
