"""Tables of human labels whose right winners are known: what is read of them is right, or it is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from stages import import_preferences
from stages.core.artifacts.schemas import PREFERENCES
from stages.core.artifacts.tables import read_table
from tests.fuzz.strategies import FATES, as_table

MAX_ROWS = 6
Winner = Literal["a", "b", "tie", "nobody"]
Cells = dict[str, Any]


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


PICTURES = {f"{row}{side}.png": _png(2 * row + (side == "b")) for row in range(MAX_ROWS) for side in "ab"}  # fmt: skip
"""The two images of each row, all different: an imported pair tells by its bytes where it is from."""


def _word(column: str, first: str, second: str, tie: str = "tie") -> Callable[[Winner], Cells]:
    names = {"a": first, "b": second, "tie": tie, "nobody": None}
    return lambda winner: {column: names[winner]}


def _numbers(first: str, second: str) -> Callable[[Winner], Cells]:
    values = {"a": (3, 1), "b": (0, 2), "tie": (2, 2), "nobody": (None, None)}
    return lambda winner: dict(zip((first, second), values[winner], strict=True))


def _list(column: str, values: Mapping[Winner, Any]) -> Callable[[Winner], Cells]:
    return lambda winner: {column: values[winner]}


SIDES: dict[tuple[str, str], dict[str, Callable[[Winner], Cells]]] = {
    ("image_a", "image_b"): {
        "names": _word("winner", "image_a", "image_b"),
        "letters": _word("winner", "A", "B"),
        "models": _word("winner", "model_a", "model_b", "tie (bothbad)"),
        "better": _word("better", "a", "b"),
        "scores": _numbers("score_a", "score_b"),
        "votes": _numbers("votes_a", "votes_b"),
        "a column of any name": _word("opinion_of_ann", "A", "B"),
        "a number that says nothing": _list("verdict", {"a": 1, "b": 0, "tie": 0.5, "nobody": None}),
    },
    ("image_0", "image_1"): {
        "index": _word("winner", "0", "1"),
        "names": _word("choice", "image_0", "image_1"),
        "labels": lambda winner: dict(
            zip(("label_0", "label_1"),
                {"a": (1, 0), "b": (0, 1), "tie": (0.5, 0.5), "nobody": (None, None)}[winner], strict=True)),
    },
    ("image_1", "image_2"): {
        "index": _word("winner", "1", "2"),
        "names": _word("preferred", "image_1", "image_2"),
    },
    ("image_left", "image_right"): {"sides": _word("winner", "left", "right")},
}  # fmt: skip
"""Two images in columns of a row, and what says who won. Some of it nobody can read without being told."""

LISTS: dict[str, Callable[[Winner], Cells]] = {
    "ranks": _list("ranks", {"a": [1, 2], "b": [2, 1], "tie": [1, 1], "nobody": None}),
    "one-hot": _list("human_preference", {"a": [1, 0], "b": [0, 1], "tie": None, "nobody": None}),
    "best": _list("best", {"a": 0, "b": 1, "tie": None, "nobody": None}),
    "preference": _list("preference", {"a": "first", "b": "second", "tie": "tie", "nobody": None}),
    "nothing": lambda _winner: {},
}
"""The same of two images in a list."""


@dataclass(frozen=True)
class Table:
    """A file of labels, and who has really won in each row."""

    kind: str
    rows: list[Cells]
    winners: list[Winner]

    def content(self) -> bytes:
        """The file's bytes."""
        if self.kind in ("csv", "tsv"):
            rows = [
                {k: "" if v is None else json.dumps(v) if isinstance(v, list) else v for k, v in row.items()}
                for row in self.rows
            ]  # fmt: skip
            return as_table(rows, "," if self.kind == "csv" else "\t")
        lines = [json.dumps(row) for row in self.rows]
        return (f"[{','.join(lines)}]" if self.kind == "json" else "\n".join(lines)).encode()


@st.composite
def verdict_tables(draw: st.DrawFn) -> Table:
    """Labels of one kind, or of two that agree; some rows without a verdict, the first ones perhaps."""
    is_list = draw(st.integers(0, 3)) == 0
    sides = draw(st.sampled_from(list(SIDES)))
    kinds = LISTS if is_list else SIDES[sides]
    chosen = draw(st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=2, unique=True))
    count = draw(st.integers(2, MAX_ROWS))
    late = draw(st.sampled_from([0, 0, 0, 1, count - 1]))
    winners: list[Winner] = []
    rows: list[Cells] = []
    for row in range(count):
        odd = draw(FATES)
        winner: Winner = "nobody" if row < late or odd == 11 else "tie" if odd in (12, 13) else draw(st.sampled_from(["a", "b"]))  # fmt: skip
        names = [f"{row}a.png", f"{row}b.png"]
        cells: Cells = {"prompt": f"prompt {row}"}
        cells |= {"images": names} if is_list else dict(zip(sides, names, strict=True))
        for kind in chosen:
            is_silent = len(chosen) == 2 and draw(FATES) in (11, 12, 13, 14)
            cells |= kinds[kind]("nobody" if is_silent else winner)
        winners.append(winner)
        rows.append(cells)
    if draw(FATES) in range(11, 18):
        rows = [{key.upper(): value for key, value in cells.items()} for cells in rows]
    if draw(FATES) in range(11, 18):
        rows = [{**cells, "id": number, "seconds": 7.5} for number, cells in enumerate(rows)]
    kinds_of_file = ["json", "jsonl", "csv", "json"] if is_list else ["csv", "tsv", "json", "jsonl"]
    kind = draw(st.sampled_from(kinds_of_file))
    return Table(kind, rows, winners)


def import_table(case: Table, folder: Path) -> list[tuple[int, str]]:
    """The whole stage. Every pair that comes out of it has the winner that people chose.

    AssertionError for a guess: another winner, or one where people named none.
    """
    for name, content in PICTURES.items():
        (folder / name).write_bytes(content)
    (folder / f"labels.{case.kind}").write_bytes(case.content())
    out = folder.parent / "out"
    import_preferences.main(
        import_preferences.Args(
            files=(folder / f"labels.{case.kind}",), num_pairs=None, num_holdout=0, seed=0, skip_bad=2,
            preferences=out / "preferences.parquet", holdout=out / "holdout.parquet",
            summary=out / "import.json",
        )
    )  # fmt: skip
    place = {content: name for name, content in PICTURES.items()}
    found = []
    for pair in read_table(out / "preferences.parquet", PREFERENCES).to_pylist():
        winner, loser = (place[pair[side]["bytes"]] for side in ("winner", "loser"))
        row, side = int(winner[0]), winner[1]
        assert loser[0] == winner[0], f"images of two rows are paired: {winner}, {loser}"
        assert pair["prompt"] == f"prompt {row}"
        assert case.winners[row] == side, f"row {row}: {side} won, people said {case.winners[row]}"
        found.append((row, side))
    return found
