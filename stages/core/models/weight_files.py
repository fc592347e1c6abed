"""Weights as safetensors whose bytes follow from their content alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

LENGTH_BYTES = 8
"""At the beginning of a file: the length of its header, little-endian."""
METADATA = "__metadata__"
"""The header's key of what is said beside the tensors."""


def save_weights(weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and what is said of them: equal content gives equal bytes, in every process.

    Not complete or nothing: write to a place that is renamed afterwards.
    """
    safetensors.torch.save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
        path,
        metadata=dict(metadata),
    )
    _order_metadata(path)


def _order_metadata(path: Path) -> None:
    """Sort the entries of a file's metadata by name, in place; the rest of the header is in a fixed order.

    The library keeps them in a hash map, whose order is another one in each process.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(size))
        header[METADATA] = dict(sorted(header[METADATA].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same JSON with its spaces left out is no longer than before"
        file.seek(LENGTH_BYTES)
        file.write(text.ljust(size))
