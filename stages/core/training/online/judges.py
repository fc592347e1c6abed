"""Who judges latents that are not finished: an implicit reward in latent space, or what sees decoded images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.core.artifacts.images import to_pixels
from stages.core.artifacts.judges import JudgeRecord, judge_of
from stages.core.artifacts.provenance import policy_name
from stages.core.method.calibration import BinWeights
from stages.core.method.noising import DrawLaw, reward_draws
from stages.core.method.rewards import implicit_reward
from stages.core.method.scoring import Judge, draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.families import arithmetic_of, load_model
from stages.core.policies.loading import load_judge
from stages.core.training.online.settings import JudgeSettings, OnlineSettings

Clean = Float[Tensor, "prompt candidate ..."]
Scores = Float[np.ndarray, "prompt candidate"]
ScoreImages = Callable[..., np.ndarray]
"""Called with images (8-bit), prompts and, if it wants it, timestep; one score an image."""


class StepJudge(ABC):
    """What says which of a prompt's unfinished images is better."""

    @abstractmethod
    def __call__(
        self,
        clean: Clean,
        prompts: Sequence[str],
        text: Conditioning,
        *,
        timestep: int,
        seeds: Sequence[int],
    ) -> Scores:
        """A score of each estimate of clean latents, in log-odds: higher is better.

        `text` has a row for each prompt. `timestep` is how noisy the latents are that the estimates come from,
        0 for finished images. `seeds` decide what a judge draws, one for each prompt.
        """


@dataclass(frozen=True, kw_only=True)
class SelfJudge(StepJudge):
    """SAIL's implicit reward of the estimates, in latent space: nothing is decoded. Paper: SAIL Eq. 8, Sec. 6.

    Differs from the paper: it names step-wise reward as future work and gives no formula.
    """

    model: DiffusionModel
    """In the precision that judges."""
    judge: Judge
    num_draws: int
    log_odds: float
    """Log-odds for each unit of reward."""
    record: JudgeRecord | None = None
    """How much each timestep counts; None counts all alike."""
    law: DrawLaw = "uniform"
    """How timesteps are drawn."""
    embedded_guidance: float = 1.0
    """The guidance that a guidance-distilled model is told."""

    def __call__(
        self,
        clean: Clean,
        prompts: Sequence[str],
        text: Conditioning,
        *,
        timestep: int,
        seeds: Sequence[int],
    ) -> Scores:
        """See `StepJudge`; all candidates of a prompt share their draws."""
        told = self.model.tell_guidance(text.in_precision(self.model.dtype), self.embedded_guidance)
        with arithmetic_of(self.model.source.settings):
            return np.stack(
                [
                    self._of_prompt(latents, told.rows(torch.tensor([place])), seeds[place])
                    for place, latents in enumerate(clean)
                ]
            )

    def _of_prompt(
        self,
        latents: Float[Tensor, "candidate ..."],
        text: Conditioning,
        seed: int,
    ) -> Float[np.ndarray, " candidate"]:
        draws = reward_draws(
            seed,
            num_draws=self.num_draws,
            num_timesteps=self.model.num_timesteps,
            latents_shape=self.model.latents_shape,
            law=self.law,
        )
        errors = draw_errors(self.model, self.judge, latents, text, draws)
        weights = None
        if self.record is not None:
            bins = BinWeights(np.array(self.record.weights))
            weights = bins.of(draws.timesteps.numpy(), self.record.num_timesteps)
        found = implicit_reward(
            policy_errors=errors.policy.numpy(),
            reference_errors=errors.reference.numpy(),
            weights=weights,
        )
        return self.log_odds * found.reward


@dataclass(frozen=True, kw_only=True)
class ImageJudge(StepJudge):
    """What scores images, shown the decoded estimates."""

    model: DiffusionModel
    score: ScoreImages
    scale: float = 1.0
    sees_timestep: bool = False
    """Whether `score` is also told the timestep."""

    def __call__(
        self,
        clean: Clean,
        prompts: Sequence[str],
        text: Conditioning,
        *,
        timestep: int,
        seeds: Sequence[int],
    ) -> Scores:
        """See `StepJudge`."""
        images = np.stack(to_pixels(self.model.decode_latents(clean.flatten(0, 1)).numpy()))
        each = [prompt for prompt in prompts for _ in range(clean.shape[1])]
        more = {"timestep": timestep} if self.sees_timestep else {}
        scores = np.asarray(self.score(images=images, prompts=each, **more), dtype=np.float64)
        return self.scale * scores.reshape(clean.shape[:2])


def load_self_judge(
    model: DiffusionModel, settings: JudgeSettings, online: OnlineSettings
) -> SelfJudge:
    """The implicit reward of a finished policy against the base; a copy of its own, which nothing trains.

    In another precision than the model's it is of the same model loaded once more, and is told the text as the
    model encodes it. UserError where a record of weights is of another policy.
    """
    record, log_odds = None, online.dpo_beta / 2
    if settings.record is not None:
        record = judge_of([Path(settings.record)], policy_name(settings.policy))
        log_odds = log_odds if record.log_odds is None else record.log_odds
    own = model.source.settings
    asked = replace(own, dtype=settings.dtype or own.dtype)
    with arithmetic_of(asked):
        judging = model if asked == own else load_model(asked, device=model.device)
        judge = load_judge(judging, settings.policy, "base", settings.rewards_by)
    if judging is not model:
        judging.release(*judging.encoder_parts)  # a secant has read a text by them
    return SelfJudge(
        model=judging,
        judge=judge,
        num_draws=settings.num_draws,
        log_odds=log_odds,
        record=record,
        law=settings.draw_law,
        embedded_guidance=settings.embedded_guidance,
    )
