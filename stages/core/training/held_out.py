"""Held-out human pairs, and how a policy judges them while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from stages.core.method.calibration import log_losses, softened_log_loss
from stages.core.method.noising import Draws, training_draws
from stages.core.method.objective import PairErrors, preference_logit
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.policies.encoding import EncodedPairs
from stages.core.policies.pair_files import PairTables, human_pairs
from stages.core.training.early_stopping import Score, kept_score
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

    def tables(self) -> PairTables | None:
        """The pairs that are scored; None if none are."""
        if self.num_pairs < 1:
            return None
        return human_pairs(self.preferences, self.latents, num_pairs=self.num_pairs)


@dataclass(frozen=True)
class Progress:
    """The held-out pairs as the policy judges them at one step; see schemas.HELD_OUT_CURVE."""

    step: int
    accuracy: float
    logit: float
    log_loss: float
    winner_error: float
    loser_error: float
    pair_log_losses: Sequence[float]

    @property
    def measures(self) -> dict[str, float]:
        """What a tracker shows: all but the step and the single pairs."""
        others = ("step", "pair_log_losses")
        return {name: value for name, value in asdict(self).items() if name not in others}


@dataclass(frozen=True)
class HeldOut:
    """Human pairs that are not trained on, with fixed draws: the same question at every step."""

    pairs: EncodedPairs
    num_draws: int
    every_steps: int
    seed: int
    rows_per_batch: int = 32
    """Pairs at once; fewer if the training's micro-batches are smaller."""
    known: WeakKeyDictionary[Denoiser, dict[int, Tensor]] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )
    """Errors of each reference, by the first row of a batch: it is frozen and the draws are the same at every step,
    so that it need not be asked again."""

    @classmethod
    def of(cls, files: HeldOutFiles, pairs: EncodedPairs | None, seed: int) -> HeldOut | None:
        """The pairs of these files with draws of their own; None where there are none."""
        if pairs is None:
            return None
        return cls(pairs=pairs, num_draws=files.num_draws, every_steps=files.every_steps, seed=seed)

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
        errors = self.errors(model, policy, reference, settings)
        logit = preference_logit(errors, settings.dpo_beta)
        logit = logit.reshape(self.num_draws, len(self.pairs)).mean(dim=0)
        log_loss, softening = softened_log_loss(logit.double().cpu().numpy())
        pair_log_losses = log_losses(softening * logit.double().cpu().numpy())
        decided = (logit > 0).float() + 0.5 * (logit == 0).float()
        return Progress(
            step=step,
            accuracy=float(decided.mean()),
            logit=float(logit.mean()),
            log_loss=log_loss,
            winner_error=float((errors.policy_w - errors.reference_w).mean()),
            loser_error=float((errors.policy_l - errors.reference_l).mean()),
            pair_log_losses=pair_log_losses.tolist(),
        )

    @torch.no_grad()
    def errors(
        self,
        model: DiffusionModel,
        policy: Denoiser,
        reference: Denoiser | None,
        settings: TrainingSettings,
    ) -> PairErrors:
        """Errors of draw 0 of each pair, then of draw 1, and so on."""
        rows = torch.arange(len(self.pairs)).repeat(self.num_draws)
        draws = training_draws(
            self.seed,
            num_pairs=len(rows),
            num_timesteps=model.num_timesteps,
            latents_shape=tuple(self.pairs.winner.shape[1:]),
            law=settings.draw_law,
        )
        known = {} if reference is None else self.known.setdefault(reference, {})
        found: list[PairErrors] = []
        for start in range(0, len(rows), self.rows_per_batch):
            part = slice(start, start + self.rows_per_batch)
            some = Draws(draws.timesteps[part], draws.noise[part])
            with model.autocast():
                errors = pair_errors(
                    model, policy, reference, self.pairs, rows[part], some,
                    torch.zeros(len(rows[part]), dtype=torch.bool), settings, known.get(start),
                )  # fmt: skip
            known[start] = torch.cat([errors.reference_w, errors.reference_l])
            found.append(errors)
        self.pairs.let_go()
        return PairErrors(
            *(torch.cat([getattr(e, part.name) for e in found]) for part in fields(PairErrors))
        )


def within(held_out: HeldOut | None, micro_batch_pairs: int | None) -> HeldOut | None:
    """Scored in batches no larger than those trained on, which are known to fit."""
    if held_out is None or micro_batch_pairs is None:
        return held_out
    return replace(held_out, rows_per_batch=min(held_out.rows_per_batch, micro_batch_pairs))


def kept_step(curve: list[Progress]) -> int:
    """The step whose weights early stopping keeps."""
    return curve[kept_score(scores_of(curve))].step


def scores_of(curve: list[Progress]) -> list[Score]:
    """What early stopping compares."""
    return [np.array(point.pair_log_losses) for point in curve]
