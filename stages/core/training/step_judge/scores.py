"""A judge's scores of encoded pairs, as a model sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.method.noising import Draws
from stages.core.policies.encoding import EncodedPairs
from stages.core.training.step_judge.estimates import Estimates
from stages.core.training.step_judge.settings import TrainableJudge

PerPair = Float[Tensor, " chosen"]


def scores_of_pairs(
    judge: TrainableJudge,
    estimates: Estimates,
    pairs: EncodedPairs,
    prompts: Sequence[str],
    rows: Int[Tensor, " chosen"],
    draws: Draws | None,
) -> tuple[PerPair, PerPair]:
    """(scores of the winners, of the losers) in float32; both images of a pair share its draw.

    Without draws the finished images are judged, at timestep 0.
    """
    device = estimates.model.device
    latents = torch.cat([pairs.winner[rows], pairs.loser[rows]])
    if draws is None:
        timesteps = torch.zeros(len(latents), dtype=torch.int64)
        images = estimates.finished(latents)
    else:
        timesteps = draws.timesteps.repeat(2)
        text = pairs.text.rows(pairs.caption[rows]).repeat(2)
        images = estimates.seen(latents, draws.noise.repeat(2, *[1] * (latents.ndim - 1)), timesteps, text)  # fmt: skip
    words = judge.read([prompts[row] for row in rows.tolist()])
    with estimates.model.autocast():
        found = judge.network(judge.see(images).to(device), timesteps.to(device), words.to(device))
    first, second = found.float().chunk(2)
    return first, second
