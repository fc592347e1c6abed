"""How often an online training calls the denoiser, decodes and judges: counts of a round from its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SELF = "self"
"""The judge that scores in latent space, by calls of two denoisers."""


@dataclass(frozen=True, kw_only=True)
class OnlineCounts:
    """What a round does where every comparison is clear: never more."""

    chain_steps: int
    """Steps of sampling: one latent through one step, with guidance or without."""
    judged: int
    """Images that are judged, finished or not; each is decoded, unless the judge is 'self'."""
    judge_draws: int
    """Judge 'self': draws of an image that are scored by both models; else 0."""
    trained_steps: int
    """Steps through which a gradient is had: two of a pair (spo, d3po), one of ddpo; over all passes."""
    compared_steps: int
    """The same through the reference, which ddpo does without."""
    rows: int
    """Rows of the denoiser that a step takes: 2 with guidance, else 1."""

    kept_latents: int
    """Latents that lie in memory to be trained on, before and after each step."""

    @property
    def calls(self) -> int:
        """Rows through a denoiser in a forward pass, whoever's; those of `trained_steps` go backward, too."""
        steps = self.chain_steps + self.trained_steps + self.compared_steps
        return self.rows * steps + 2 * self.judge_draws


@dataclass(frozen=True, kw_only=True)
class OnlineRates:
    """Seconds of one unit of each kind of an online training's work on one device."""

    chain_step: float
    """One latent through one step of sampling, with guidance if there is any."""
    decode_image: float
    """One image through the VAE's decoder."""
    trained_step: float
    """One step through the policy, forward and backward, and through the reference where there is one."""


def count_round(
    online: Mapping[str, Any], *, judge: str, judge_draws: int, is_told_guidance: bool = False
) -> OnlineCounts:
    """What a round of the config's block `online` does; of `OnlineSettings` the same names are read.

    `is_told_guidance` of a model whose denoiser is told the guidance, so that one row is enough.
    """
    method, prompts = online["method"], online["prompts_per_update"]
    size, steps = online["candidates_per_prompt"], online["num_inference_steps"]
    if method == "spo":
        alone = online["divert_step"] + 1
        moves = steps - online["divert_step"]
        chain_steps = alone + size * (steps - alone)
        judged = size * math.ceil(moves / online["inner_steps"])
        trained = 2 * moves
    else:
        chain_steps, judged = size * steps, size
        trained = 2 * steps if method == "d3po" else size * steps
    trained *= prompts * online["passes"]
    return OnlineCounts(
        chain_steps=prompts * chain_steps,
        judged=prompts * judged,
        judge_draws=prompts * judged * judge_draws if judge == SELF else 0,
        trained_steps=trained,
        compared_steps=0 if method == "ddpo" else trained,
        rows=1 if online["guidance_scale"] == 1 or is_told_guidance else 2,
        kept_latents=2 * trained // online["passes"],
    )


def online_seconds(
    a_round: OnlineCounts, rounds: int, rates: OnlineRates, score_draw: float
) -> dict[str, float]:
    """Device seconds of all rounds by kind of work; `score_draw` is one draw of one image by both models.

    A metric's own time is not in it.
    """
    if a_round.judge_draws:
        judging = a_round.judge_draws * score_draw
    else:
        judging = a_round.judged * rates.decode_image
    return {
        "online: sample": rounds * a_round.chain_steps * rates.chain_step,
        "online: judge": rounds * judging,
        "online: train": rounds * a_round.trained_steps * rates.trained_step,
    }
