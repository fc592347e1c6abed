"""What a round gives to train on, and the rows that say where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Row = dict[str, Any]


@dataclass(frozen=True)
class Transitions:
    """Steps of chains, on the CPU in float32: one side of each (ddpo), or a winner's and a loser's."""

    caption: Int[Tensor, " item"]
    """Row of the captions' conditioning."""
    number: Int[Tensor, " item"]
    """Which step of the chain, from 0."""
    chain: Int[Tensor, " item"]
    """Items of one number are of one image, or of one prompt's pool."""
    before: Float[Tensor, "item side ..."]
    after: Float[Tensor, "item side ..."]
    log_probability: Float[Tensor, " item"]
    """ddpo: of the step under the policy that took it; else 0."""
    advantage: Float[Tensor, " item"]
    """ddpo: what the finished image is worth; else 0."""

    def __len__(self) -> int:
        return len(self.caption)

    def rows(self, index: Int[Tensor, " chosen"]) -> Transitions:
        """The chosen items, in that order."""
        return Transitions(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Transitions]) -> Transitions:
        """All items of the parts, one part after the other."""
        return Transitions(
            *(
                torch.cat([getattr(part, field.name) for part in parts])
                for field in fields(Transitions)
            )
        )

    @staticmethod
    def none(sides: int, shape: tuple[int, ...]) -> Transitions:
        """No item."""
        whole, real = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        empty = torch.zeros((0, sides, *shape))
        return Transitions(whole, whole, whole, empty, empty, real, real)


@dataclass(frozen=True)
class Rollout:
    """What some prompts of a round gave."""

    transitions: Transitions
    rows: list[Row]
    """One for each transition that was judged, in the same order where all are trained on; schema transitions."""


def joined(parts: Sequence[Rollout]) -> Rollout:
    """All of the parts; the chains are numbered anew, for each part counts its own."""
    transitions, first = [], 0
    for part in parts:
        own = part.transitions
        renumbered = [
            own.chain + first if field.name == "chain" else getattr(own, field.name)
            for field in fields(own)
        ]
        transitions.append(Transitions(*renumbered))
        first += int(own.chain.max()) + 1 if len(own) else 0
    return Rollout(Transitions.joined(transitions), [row for part in parts for row in part.rows])
