"""What a person has decided about pairs: the table, and how it is applied to pairs of the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.artifacts.schemas import Schema, column
from stages.core.artifacts.tables import read_batches, read_table, read_tables

Row = dict[str, Any]

DECISIONS = Schema(
    "decisions",
    1,
    pa.schema(
        [
            column("pair_id", pa.string(), "name of the pair; a rerun may give it to other images"),
            column("iteration", pa.int32(), "iteration that made the pair; 0 for human pairs"),
            column("prompt_id", pa.string(), "digest of the normalised prompt"),
            column("prompt", pa.string(), "text as it is given to the model"),
            column("winner_digest", pa.string(), "SHA-256 of the winner's image file, as it was"),
            column("loser_digest", pa.string(), "SHA-256 of the loser's image file, as it was"),
            column("decision", pa.string(), "'veto': not a pair; 'flip': the loser is better"),
            column("was_blind", pa.bool_(), "whether the person did not see which was which"),
            column("decided_at", pa.string(), "UTC, ISO 8601"),
            column("policy_digest", pa.string(), "generated pairs: sampling policy", nullable=True),
            column("winner_seed", pa.int64(), "generated pairs: sampling seed", nullable=True),
            column("loser_seed", pa.int64(), "generated pairs: sampling seed", nullable=True),
            column("source_file", pa.string(), "human pairs: file of the label", nullable=True),
            column("source_row", pa.int64(), "human pairs: row in it, from 0", nullable=True),
        ]
    ),
)

NOTES = Schema(
    "notes",
    1,
    pa.schema(
        [
            *(DECISIONS.arrow.field(name) for name in DECISIONS.arrow.names[:6]),
            column("note", pa.string(), "what a person wrote about the pair"),
            column("decided_at", pa.string(), "UTC, ISO 8601"),
        ]
    ),
)

SIDES = ("winner", "loser")
Subject = tuple[str, frozenset[str]]
"""What a decision is about: a prompt and the digests of two images, whichever was called the winner."""
AT_ONCE = 64


def decisions_file(run: Path, iteration: int) -> Path:
    """Where the decisions about an iteration's pairs lie; those about human pairs under 0.

    One file an iteration, so that a decision reruns nothing before its iteration.
    """
    return run / "decisions" / f"iter{iteration:02d}.parquet"


def image_digest(data: bytes) -> str:
    """By what an image is known in a decision: SHA-256 of its file."""
    return hashlib.sha256(data).hexdigest()


def subject(prompt_id: str, *images: str) -> Subject:
    """By what a decision is found again."""
    return prompt_id, frozenset(images)


@dataclass
class Decided:
    """Which rows of a table decisions are about."""

    vetoed: list[int] = field(default_factory=list)
    flipped: list[int] = field(default_factory=list)
    num_as_wished: int = 0
    """Flips that the table does not need: its winner is the one that the person prefers."""

    def kept(self, num_rows: int) -> list[int]:
        """The rows that are not vetoed, in rising order."""
        vetoed = set(self.vetoed)
        return [row for row in range(num_rows) if row not in vetoed]


class Decisions:
    """The decisions of some tables, found by the prompts and images that they are about."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._known = {
            subject(row["prompt_id"], row["winner_digest"], row["loser_digest"]): row
            for row in rows
        }
        self._prompts = pa.array(sorted({prompt for prompt, _ in self._known}), pa.string())
        self._found: set[Subject] = set()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def num_stale(self) -> int:
        """Decisions about images that no table, of those looked at, has."""
        return len(self._known) - len(self._found)

    def about(self, path: Path, schema: Schema) -> Decided:
        """The rows of a table of pairs that a decision is about, by the prompt and both images."""
        decided = Decided()
        if not self._known:
            return decided
        prompts = read_table(path, schema, ["prompt_id"]).column("prompt_id")
        rows = np.flatnonzero(pc.is_in(prompts, self._prompts)).tolist()
        images = read_batches(path, schema, ["prompt_id", *SIDES], size=AT_ONCE, rows=rows)
        pairs = (pair for batch in images for pair in batch.to_pylist())
        for row, pair in zip(rows, pairs, strict=True):
            winner, loser = (image_digest(pair[side]["bytes"] or b"") for side in SIDES)
            about = subject(pair["prompt_id"], winner, loser)
            found = self._known.get(about)
            if found is None:
                continue
            self._found.add(about)
            if found["decision"] == "veto":
                decided.vetoed.append(row)
            elif winner == found["winner_digest"]:
                decided.flipped.append(row)
            else:
                decided.num_as_wished += 1
        return decided


def read_decisions(paths: Sequence[Path]) -> Decisions:
    """The decisions of some tables (schema decisions); of none, none."""
    return Decisions(read_tables(paths, DECISIONS).to_pylist() if paths else ())


def turned(pairs: pa.Table, rows: Sequence[int], flipped: Iterable[int]) -> pa.Table:
    """Pairs that stand at `rows` of their table, with winner and loser of the flipped rows exchanged."""
    wanted = np.isin(rows, list(flipped))
    if not wanted.any():
        return pairs
    both = pa.concat_tables([pairs, exchanged(pairs)])
    return both.take(np.arange(len(pairs)) + len(pairs) * wanted)


def exchanged(pairs: pa.Table) -> pa.Table:
    """The pairs with winner and loser exchanged: images, lineage, scores, latents; the margin negated.

    p(winner > loser) becomes 1 where there is one: a person has said so. With soft labels the judge's own
    p would teach the opposite.
    """
    arrays = []
    for name in pairs.column_names:
        side, _, rest = name.partition("_")
        other: dict[str, Literal["winner", "loser"]] = {"winner": "loser", "loser": "winner"}
        array = pairs.column("_".join(filter(None, (other.get(side, side), rest))))
        if name == "margin":
            array = pc.negate(array)
        elif name == "probability":
            array = pc.if_else(pc.is_valid(array), pa.scalar(1, array.type), array)
        arrays.append(array)
    return pa.table(arrays, schema=pairs.schema)
