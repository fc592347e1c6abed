"""Held-out human pairs, and how a policy judges them while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stages.core.artifacts.joins import join_latents
from stages.core.artifacts.schemas import PAIR_LATENTS, PREFERENCES
from stages.core.artifacts.tables import read_table
from stages.core.method.calibration import softened_log_loss
from stages.core.method.noising import Draws, training_draws
from stages.core.method.objective import PairErrors, preference_logit
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.policies.encoding import EncodedPairs, encode_pairs
from stages.core.training.early_stopping import Score, best_score
from stages.core.training.pair_losses import pair_errors
from stages.core.training.settings import TrainingSettings


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


@dataclass(frozen=True)
class Progress:
    """The held-out pairs as the policy judges them at one step; see schemas.HELD_OUT_CURVE."""

    step: int
    accuracy: float
    logit: float
    log_loss: float
    winner_error: float
    loser_error: float


@dataclass(frozen=True)
class HeldOut:
    """Human pairs that are not trained on, with fixed draws: the same question at every step."""

    pairs: EncodedPairs
    num_draws: int
    every_steps: int
    seed: int
    rows_per_batch: int = 32
    """Pairs at once; fewer if the training's micro-batches are smaller."""

    @torch.no_grad()
    def score(
        self,
        model: DiffusionModel,
        policy: Denoiser,
        reference: Denoiser | None,
        settings: TrainingSettings,
        *,
        step: int,
    ) -> Progress:
        """Accuracy, mean logit, softened log-loss, and how far winner and loser errors have moved from the reference.

        The logit of a pair is its mean over the draws; an undecided pair counts half.
        """
        count = len(self.pairs)
        rows = torch.arange(count).repeat(self.num_draws)
        draws = training_draws(
            self.seed,
            num_pairs=len(rows),
            num_timesteps=model.num_timesteps,
            latents_shape=tuple(self.pairs.winner.shape[1:]),
            law=settings.draw_law,
        )
        found: list[PairErrors] = []
        for start in range(0, len(rows), self.rows_per_batch):
            part = slice(start, start + self.rows_per_batch)
            some = Draws(draws.timesteps[part], draws.noise[part])
            with model.autocast():
                found.append(
                    pair_errors(
                        model, policy, reference, self.pairs, rows[part], some,
                        torch.zeros(len(rows[part]), dtype=torch.bool), settings,
                    )
                )  # fmt: skip
        logit = torch.cat([preference_logit(e, settings.dpo_beta) for e in found])
        logit = logit.reshape(self.num_draws, count).mean(dim=0)
        decided = (logit > 0).float() + 0.5 * (logit == 0).float()
        return Progress(
            step=step,
            accuracy=float(decided.mean()),
            logit=float(logit.mean()),
            log_loss=softened_log_loss(logit.double().cpu().numpy())[0],
            winner_error=float(torch.cat([e.policy_w - e.reference_w for e in found]).mean()),
            loser_error=float(torch.cat([e.policy_l - e.reference_l for e in found]).mean()),
        )


def best_step(curve: list[Progress]) -> int:
    """The step with the best held-out score, whose weights early stopping keeps."""
    return curve[best_score(scores_of(curve))].step


def scores_of(curve: list[Progress]) -> list[Score]:
    """What early stopping compares."""
    return [-point.log_loss for point in curve]
