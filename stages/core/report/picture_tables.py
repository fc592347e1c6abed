"""The evaluation's images of all policies: where each lies, and those that a page shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.core.artifacts.schemas import IMAGES, METRIC_SCORES, Schema
from stages.core.artifacts.tables import read_batches, read_table
from stages.core.errors import UserError
from stages.core.report.thumbnails import Thumbnail, thumbnail

Wanted = tuple[str, int]
"""A prompt's id and the number of one of its images."""


@dataclass(frozen=True)
class Place:
    """Where an image lies."""

    path: Path
    row: int
    seed: int


class EvaluationPictures:
    """The images of one prompt set, by policy."""

    def __init__(self, files: Mapping[str, Sequence[Path]]) -> None:
        self._places: dict[str, dict[Wanted, Place]] = {}
        self.prompts: dict[str, str] = {}
        """Text of each prompt by its id, in the order of the first policy's tables."""
        self.num_rows = 0
        for policy, paths in files.items():
            self._places[policy] = dict(self._read_places(paths))

    def read(
        self, policies: Sequence[str], wanted: Iterable[Wanted], max_bytes: int
    ) -> dict[tuple[str, Wanted], Thumbnail]:
        """These images of these policies. UserError if the policies drew one from different noise."""
        order = list(dict.fromkeys(wanted))
        found = {}
        for policy in policies:
            by_path: dict[Path, list[tuple[int, Wanted]]] = {}
            for one in order:
                place = self._checked(policy, one)
                by_path.setdefault(place.path, []).append((place.row, one))
            for path, rows in by_path.items():
                images = read_images(path, IMAGES, ("image",), [row for row, _ in rows], max_bytes)
                for (_row, one), (image,) in zip(rows, images, strict=True):
                    found[policy, one] = image
        return found

    def _read_places(self, paths: Sequence[Path]) -> Iterable[tuple[Wanted, Place]]:
        for path in paths:
            table = read_table(path, IMAGES, ("prompt_id", "prompt", "candidate", "seed"))
            self.num_rows += len(table)
            columns = (table.column(name).to_pylist() for name in table.column_names)
            for row, (name, text, candidate, seed) in enumerate(zip(*columns, strict=True)):
                self.prompts.setdefault(name, text)
                yield (name, candidate), Place(path, row, seed)

    def _checked(self, policy: str, one: Wanted) -> Place:
        """Where a policy's image lies, known to have the seed of the first policy's."""
        first = next(iter(self._places))
        expected, found = self._places[first].get(one), self._places[policy].get(one)
        if expected is None or found is None or expected.seed != found.seed:
            seeds = {
                name: f"seed {place.seed}" if place else "no such image"
                for name, place in ((first, expected), (policy, found))
            }
            raise UserError(
                f"candidate {one[1]} of prompt {one[0]} has {seeds[policy]} in the evaluation images "
                f"of {policy}, and {seeds[first]} in those of {first}. Sample the evaluation images "
                "of all policies for the same prompts from the same seeds."
            )
        return found


def read_scores(path: Path) -> dict[str, dict[int, float]]:
    """Scores of a prompt's images, by prompt and number of the image."""
    table = read_table(path, METRIC_SCORES, ("prompt_id", "candidate", "score"))
    columns = (table.column(name).to_pylist() for name in ("prompt_id", "candidate", "score"))
    found: dict[str, dict[int, float]] = {}
    for name, candidate, score in zip(*columns, strict=True):
        found.setdefault(name, {})[candidate] = score
    return found


def read_images(
    path: Path, schema: Schema, columns: tuple[str, ...], places: Sequence[int], max_bytes: int
) -> list[tuple[Thumbnail, ...]]:
    """The images in some rows of a table, column by column, ready for the page."""
    order = sorted(set(places))
    batches = read_batches(path, schema, columns, size=1, rows=order)
    by_place = {
        place: tuple(
            thumbnail(row[name]["bytes"], f"{path}, row {place}, column {name!r}", max_bytes)
            for name in columns
        )
        for place, row in zip(order, (row for b in batches for row in b.to_pylist()), strict=True)
    }
    return [by_place[place] for place in places]


def evenly_spaced(items: Sequence[str], num: int) -> list[str]:
    """So many items, spread evenly from the first to the last; all where there are no more."""
    if num >= len(items):
        return list(items)
    if num == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (num - 1))] for i in range(num)]
