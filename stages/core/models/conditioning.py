"""What a denoiser is told about each row of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about each row of a batch: tensors by name, one row each."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def repeat(self, count: int) -> Conditioning:
        """The rows of this conditioning, `count` times over."""
        return self._each(lambda t: t.repeat(count, *[1] * (t.ndim - 1)))

    def repeat_each(self, count: int) -> Conditioning:
        """Every row `count` times, one after the other."""
        return self._each(lambda t: t.repeat_interleave(count, dim=0))

    def join(self, other: Conditioning) -> Conditioning:
        """The rows of this conditioning, then those of the other."""
        return Conditioning({k: torch.cat([t, other[k]]) for k, t in self.tensors.items()})

    def rows(self, index: Int[Tensor, " chosen"]) -> Conditioning:
        """The chosen rows, in that order."""
        return self._each(lambda t: t[index.to(t.device)])

    def to(self, device: torch.device) -> Conditioning:
        """The same on another device."""
        return self._each(lambda t: t.to(device))

    def in_precision(self, dtype: torch.dtype) -> Conditioning:
        """The same with its floating-point numbers in another precision."""
        return self._each(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def _each(self, change: Any) -> Conditioning:
        return Conditioning({name: change(tensor) for name, tensor in self.tensors.items()})
