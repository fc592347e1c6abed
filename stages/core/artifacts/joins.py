"""Joins of tables that list the same items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa

from stages.core.artifacts.schemas import PAIR_LATENTS, PREFERENCES, Schema
from stages.core.artifacts.tables import num_rows, read_batches
from stages.core.errors import UserError

ENCODED_AT_ONCE = 16
"""Rows whose images go through the VAE together. How they are grouped decides how sums round."""


def batches_in_turn(shards: Sequence[Path], schema: Schema, *, size: int) -> Iterator[pa.Table]:
    """Batches of `size` rows, one of each shard after the other: the order that they were dealt out from."""
    parts = [read_batches(path, schema, size=size) for path in shards]
    for batches in zip_longest(*parts):
        yield from (batch for batch in batches if batch is not None)


def join_latents(pairs: pa.Table, latents: pa.Table, path: Path) -> pa.Table:
    """The pairs with their latents beside them. UserError unless both list the same pairs."""
    refuse_other_pairs(pairs, latents, path)
    for name in PAIR_LATENTS.arrow.names[1:]:
        pairs = pairs.append_column(name, latents.column(name))
    return pairs


def refuse_other_pairs(pairs: pa.Table, latents: pa.Table, path: Path) -> None:
    """UserError unless the pairs and the latents of `path` are those of the same pairs."""
    if pairs.column("pair_id").to_pylist() != latents.column("pair_id").to_pylist():
        raise _other_pairs(path)


def refuse_other_images(likes: pa.Table, latents: pa.Table, path: Path) -> None:
    """UserError unless the likes and the latents of `path` are those of the same images."""
    if likes.column("image_id").to_pylist() != latents.column("image_id").to_pylist():
        raise UserError(
            f"{path} does not list the same images as the likes it belongs to; run encode_preferences again"
        )


def joined_batches(
    preferences: Path, latents: Path, rows: Sequence[int], *, size: int
) -> Iterator[pa.Table]:
    """The human pairs at some positions with images and latents, `size` at a time.

    UserError unless both files list the same pairs.
    """
    if num_rows(preferences) != num_rows(latents):
        raise _other_pairs(latents)
    for pairs, encoded in zip(
        read_batches(preferences, PREFERENCES, size=size, rows=rows),
        read_batches(latents, PAIR_LATENTS, size=size, rows=rows),
        strict=True,
    ):
        yield join_latents(pairs, encoded, latents)


def _other_pairs(path: Path) -> UserError:
    return UserError(
        f"{path} does not list the same pairs as the preferences it belongs to; "
        "run encode_preferences again"
    )
