"""Held-out human pairs as a step-aware judge sees them, one timestep after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stages.core.method.noising import Draws, training_draws
from stages.core.method.step_preference import shares_right, step_preference_loss
from stages.core.policies.encoding import EncodedPairs
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.step_judge.estimates import Estimates
from stages.core.training.step_judge.scores import scores_of_pairs
from stages.core.training.step_judge.settings import HELD_OUT_TIMESTEPS, TrainableJudge


@dataclass(frozen=True)
class Point:
    """How held-out pairs are judged at one timestep; see online_tables.STEP_JUDGE_CURVE."""

    step: int
    timestep: int
    num_pairs: int
    accuracy: float
    log_loss: float


@dataclass(frozen=True, kw_only=True)
class HeldOutJudgement:
    """Pairs that are not trained on, with the same noise at every step."""

    pairs: EncodedPairs
    prompts: Sequence[str]
    num_draws: int
    every_steps: int
    seed: int
    rows_per_batch: int

    @classmethod
    def of(
        cls, files: HeldOutFiles, pairs: EncodedPairs | None, prompts: Sequence[str], seed: int,
        rows_per_batch: int,
    ) -> HeldOutJudgement | None:  # fmt: skip
        """The pairs of these files; None where there are none."""
        if pairs is None:
            return None
        return cls(
            pairs=pairs, prompts=prompts, num_draws=files.num_draws, every_steps=files.every_steps,
            seed=seed, rows_per_batch=rows_per_batch,
        )  # fmt: skip

    @torch.no_grad()
    def score(self, judge: TrainableJudge, estimates: Estimates, *, step: int) -> list[Point]:
        """Share of pairs that are judged as people did, and the mean loss, at each of the published timesteps.

        At 0 the finished images are seen, as the VAE gives them back. Else each pair counts once for each draw of
        noise. Equal scores count half.
        """
        return [self._at(timestep, judge, estimates, step) for timestep in HELD_OUT_TIMESTEPS]

    def _at(self, timestep: int, judge: TrainableJudge, estimates: Estimates, step: int) -> Point:
        model = estimates.model
        rows = torch.arange(len(self.pairs)).repeat(self.num_draws if timestep else 1)
        timesteps = torch.full((len(rows),), min(timestep, model.num_timesteps - 1))
        drawn = training_draws(
            self.seed,
            num_pairs=len(rows),
            num_timesteps=model.num_timesteps,
            latents_shape=model.latents_shape,
        )
        right, loss = 0.0, 0.0
        for start in range(0, len(rows), self.rows_per_batch):
            part = slice(start, start + self.rows_per_batch)
            draws = Draws(timesteps[part], drawn.noise[part]) if timestep else None
            first, second = scores_of_pairs(
                judge, estimates, self.pairs, self.prompts, rows[part], draws
            )
            label = torch.ones_like(first)
            right += float(shares_right(first, second, label).sum())
            loss += float(step_preference_loss(first, second, label).sum())
        self.pairs.let_go()
        return Point(step, timestep, len(self.pairs), right / len(rows), loss / len(rows))
