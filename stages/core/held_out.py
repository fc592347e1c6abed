"""The held-out human pairs that a training is asked about on its way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stages.core.artifacts import read_table
from stages.core.held_out_curve import HeldOut
from stages.core.models import DiffusionModel
from stages.core.policies import encode_pairs
from stages.core.schemas import PAIR_LATENTS, PREFERENCES
from stages.core.tables import join_latents


@dataclass(frozen=True, kw_only=True)
class HeldOutFiles:
    """Which held-out pairs are scored on the way, how thoroughly, and how often."""

    preferences: Path
    """Held-out pairs (schema preferences)."""
    latents: Path
    """Their latents (schema pair_latents)."""
    num_pairs: int = 64
    """The first so many of them; 0 scores none."""
    num_draws: int = 4
    """Draws of (timestep, noise) of each pair, the same at every step."""
    every_steps: int = 20
    """Optimizer steps between two scores."""

    @property
    def files(self) -> list[Path]:
        """The files, as inputs of what is trained beside them."""
        return [self.preferences, self.latents]


def read_held_out(model: DiffusionModel, held_out: HeldOutFiles, seed: int) -> HeldOut | None:
    """The pairs with fixed draws; None if none are to be scored."""
    if held_out.num_pairs < 1:
        return None
    table = join_latents(
        read_table(held_out.preferences, PREFERENCES, ["pair_id", "prompt"]),
        read_table(held_out.latents, PAIR_LATENTS),
        held_out.latents,
    ).slice(0, held_out.num_pairs)
    return HeldOut(
        pairs=encode_pairs(model, table, str(held_out.latents)),
        num_draws=held_out.num_draws,
        every_steps=held_out.every_steps,
        seed=seed,
    )
