"""The difference of two models' errors, from two models further apart on the same line.

A policy is near its reference, so in half precision most of the difference of their errors is rounding.
Let m be the weights half way between the two, d the policy's minus the reference's, and s a stretch of 1 or
more. By the midpoint rule

    prediction(policy) - prediction(reference) = [prediction(m + s d/2) - prediction(m - s d/2)] / s + O(s^2 |d|^3),

so rounding shrinks as 1/s while the curvature of the prediction grows as s^2. The two networks go through
their usual, fast arithmetic: the cost is that of the plain difference, which s = 1 is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.method.noising import generator
from stages.core.method.scoring import Judge, about_the_middle
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser

Weights = Mapping[str, Tensor]

LARGEST = 64.0
"""The largest stretch."""
NUM_ROWS = 4
"""Of the batch that they are tried on: pure noise at timesteps over the whole range."""


@dataclass(frozen=True)
class Secant(Judge):
    """Networks at both ends of the stretched line."""

    ahead: Denoiser
    """At m + s d/2."""
    behind: Denoiser
    """At m - s d/2."""
    stretch: float
    """s."""

    @classmethod
    def between(cls, model: DiffusionModel, policy: Weights, reference: Weights) -> Secant:
        """Of two models' float32 weights, by the stretch at which rounding and curvature move least."""
        ahead, behind = model.load_denoiser(), model.load_denoiser()
        latents = torch.randn((NUM_ROWS, *model.latents_shape), generator=generator(0))
        inputs = (
            latents.to(model.device, model.dtype),
            ((torch.arange(NUM_ROWS) + 0.5) / NUM_ROWS * model.num_timesteps)
            .long()
            .to(model.device),
            model.encode_text([""]).repeat(NUM_ROWS),
        )

        @torch.no_grad()
        def difference(stretch: float) -> Tensor:
            _place(ahead, behind, policy, reference, stretch)
            ends = [model.predict(each, *inputs).double() for each in (ahead, behind)]
            return (ends[0] - ends[1]).cpu() / stretch

        chosen = best_stretch(difference)
        _place(ahead, behind, policy, reference, chosen)
        return cls(ahead, behind, chosen)

    def errors(
        self,
        model: DiffusionModel,
        noised: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
        context: Conditioning,
        target: Float[Tensor, "row ..."],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(policy's errors, reference's errors, mean squared difference of predictions) of each row."""
        ahead, behind = (
            model.predict(denoiser, noised, timesteps, context).float()
            for denoiser in (self.ahead, self.behind)
        )
        return about_the_middle((ahead + behind) / 2, (ahead - behind) / self.stretch, target)


def best_stretch(difference: Callable[[float], Tensor]) -> float:
    """The power of two from which doubling moves the difference least.

    From s to 2s rounding, a / s, moves it by 1.1 a / s, and curvature, b s^2, by 3 b s^2. Their sum of squares is
    least at s = 0.64 (a/b)^(1/3); what is off, a^2/s^2 + b^2 s^4, is least at 0.89 (a/b)^(1/3), and at the
    first a sixth above its least. Doubling stops where the difference moves more than before. 1 for two equal
    models, and for values that are not finite.
    """
    stretch, best, least = 1.0, 1.0, float("inf")
    before = difference(stretch)
    while stretch < LARGEST:
        after = difference(2 * stretch)
        moved = float((after - before).norm())
        if not moved < least:  # not a number, too
            break
        best, least = stretch, moved
        stretch, before = 2 * stretch, after
    return best if least > 0 else 1.0


@torch.no_grad()
def _place(
    ahead: Denoiser, behind: Denoiser, policy: Weights, reference: Weights, stretch: float
) -> None:
    """Put the networks' weights on the line, `stretch` times as far apart as the two models are."""
    ends = (denoiser.network.named_parameters() for denoiser in (ahead, behind))
    for (name, further), (_, back) in zip(*ends, strict=True):
        to, ours = (weights[name].to(further.device) for weights in (policy, reference))
        middle, half = (to + ours) / 2, (to - ours) * (stretch / 2)
        further.copy_(middle + half)
        back.copy_(middle - half)
