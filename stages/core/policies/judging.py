"""Images that lie there as a policy judges them: encoded, noised, and compared with its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stages.core.artifacts.images import to_model_input
from stages.core.artifacts.judges import judge_of
from stages.core.artifacts.provenance import policy_digest
from stages.core.errors import UserError
from stages.core.method.calibration import BinWeights
from stages.core.method.noising import DrawLaw, reward_draws
from stages.core.method.rewards import implicit_reward
from stages.core.method.scoring import draw_errors
from stages.core.method.seeding import seed_of
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.loading import RewardsBy, load_judge


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What decides the rewards."""

    model: ModelSettings
    policy: str
    """A policy folder."""
    reference: str
    """The policy folder that it is compared with, or 'base'."""
    record: Path | None
    """The record of the judge that a run has fitted to this policy; without one all timesteps count alike."""
    num_draws: int
    seed: int
    rewards_by: RewardsBy = "difference"
    """'difference' of two errors, or 'secant' or 'derivative', for which half precision suffices."""
    draw_law: DrawLaw = "uniform"
    """How timesteps are drawn; the law that the record was fitted with."""
    embedded_guidance: float = 1.0
    """The guidance that a guidance-distilled model is told where it judges."""


class ImageJudge:
    """Judges the images of one prompt after another."""

    def __init__(self, judging: Judging, device: torch.device) -> None:
        """UserError if the record is of another policy, or of another noise schedule."""
        self._judging = judging
        self._bins: BinWeights | None = None
        if judging.record is not None:
            record = judge_of([judging.record], policy_digest(Path(judging.policy)))
            self._bins = BinWeights(np.array(record.weights))
        self._model = load_model(judging.model, device=device)
        if judging.record is not None and record.num_timesteps != self._model.num_timesteps:
            raise UserError(
                f"{judging.record} has {record.num_timesteps} timesteps, {judging.model.base} "
                f"{self._model.num_timesteps}; name the record of a run of this model"
            )
        self._judge = load_judge(self._model, judging.policy, judging.reference, judging.rewards_by)

    def rewards(
        self, prompt_id: str, prompt: str, images: Sequence[Image.Image]
    ) -> list[tuple[float, float | None]]:
        """The implicit reward of each image, by the record's weights, and its standard error.

        All images share their draws; of one draw there is no error. UserError if a reward is not finite.
        Paper: SAIL Eq. 8.
        """
        model = self._model
        draws = reward_draws(
            seed_of(self._judging.seed, "label", prompt_id),
            num_draws=self._judging.num_draws,
            num_timesteps=model.num_timesteps,
            latents_shape=model.latents_shape,
            law=self._judging.draw_law,
        )
        text = model.tell_guidance(model.encode_text([prompt]), self._judging.embedded_guidance)
        pixels = torch.from_numpy(to_model_input(images, model.image_size))
        errors = draw_errors(model, self._judge, model.encode_images(pixels), text, draws)
        weights = (
            self._bins.of(draws.timesteps.numpy(), model.num_timesteps) if self._bins else None
        )
        found = implicit_reward(
            policy_errors=errors.policy.numpy(),
            reference_errors=errors.reference.numpy(),
            weights=weights,
        )
        if not np.isfinite(found.reward).all():
            raise UserError(
                f"the rewards of {prompt!r} are not finite: {found.reward.tolist()}. "
                f"{self._judging.policy} has diverged, or {self._judging.model.dtype} is too narrow."
            )
        return [
            (float(reward), float(error) if np.isfinite(error) else None)
            for reward, error in zip(found.reward, found.standard_error, strict=True)
        ]
