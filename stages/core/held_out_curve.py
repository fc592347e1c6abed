"""How a policy judges held-out pairs while it is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stages.core.early_stopping import Score, best_score
from stages.core.models import Denoiser, DiffusionModel
from stages.core.noising import Draws, training_draws
from stages.core.objective import PairErrors, preference_logit
from stages.core.pair_losses import EncodedPairs, pair_errors
from stages.core.training_settings import TrainingSettings


@dataclass(frozen=True)
class Progress:
    """The held-out pairs as the policy judges them at one step; see schemas.HELD_OUT_CURVE."""

    step: int
    accuracy: float
    logit: float
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
        """Accuracy, mean logit, and how far winner and loser errors have moved from the reference.

        The logit of a pair is its mean over the draws; an undecided pair counts half.
        """
        count = len(self.pairs)
        rows = torch.arange(count).repeat(self.num_draws)
        draws = training_draws(
            self.seed,
            num_pairs=len(rows),
            num_timesteps=model.num_timesteps,
            latents_shape=tuple(self.pairs.winner.shape[1:]),
        )
        found: list[PairErrors] = []
        for start in range(0, len(rows), self.rows_per_batch):
            part = slice(start, start + self.rows_per_batch)
            some = Draws(draws.timesteps[part], draws.noise[part])
            with model.autocast():
                found.append(
                    pair_errors(
                        model, policy, reference, self.pairs, rows[part], some,
                        torch.zeros(len(rows[part]), dtype=torch.bool),
                    )
                )  # fmt: skip
        logit = torch.cat([preference_logit(e, settings.dpo_beta) for e in found])
        logit = logit.reshape(self.num_draws, count).mean(dim=0)
        decided = (logit > 0).float() + 0.5 * (logit == 0).float()
        return Progress(
            step=step,
            accuracy=float(decided.mean()),
            logit=float(logit.mean()),
            winner_error=float(torch.cat([e.policy_w - e.reference_w for e in found]).mean()),
            loser_error=float(torch.cat([e.policy_l - e.reference_l for e in found]).mean()),
        )


def best_step(curve: list[Progress]) -> int:
    """The step with the best held-out score, whose weights early stopping keeps."""
    return curve[best_score(scores_of(curve))].step


def scores_of(curve: list[Progress]) -> list[Score]:
    """What early stopping compares."""
    return [(point.accuracy, point.logit) for point in curve]
