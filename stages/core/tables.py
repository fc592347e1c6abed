"""Joins of tables that list the same items."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from stages.core.errors import UserError
from stages.core.schemas import PAIR_LATENTS


def join_latents(pairs: pa.Table, latents: pa.Table, path: Path) -> pa.Table:
    """The pairs with their latents beside them. UserError unless both list the same pairs."""
    if pairs.column("pair_id").to_pylist() != latents.column("pair_id").to_pylist():
        raise UserError(
            f"{path} does not list the same pairs as the preferences it belongs to; "
            "run encode_preferences again"
        )
    for name in PAIR_LATENTS.arrow.names[1:]:
        pairs = pairs.append_column(name, latents.column(name))
    return pairs
