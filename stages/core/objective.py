"""The Diffusion-DPO objective as functions of denoising errors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def denoising_error(
    prediction: Float[Tensor, "batch ..."],
    target: Float[Tensor, "batch ..."],
) -> Float[Tensor, " batch"]:
    """Mean over channel and space of (target - prediction)^2, in float32 at least.

    Differs from the paper: it writes a squared norm (a sum); the mean is what the Diffusion-DPO
    code takes and what dpo_beta = 5000 belongs to. Paper: SAIL Eq. 7.
    """
    wide = prediction if prediction.dtype == torch.float64 else prediction.float()
    return (target.to(wide.dtype) - wide).square().flatten(start_dim=1).mean(dim=1)


def preference_logit(
    *,
    policy_error_w: Float[Tensor, " pair"],
    policy_error_l: Float[Tensor, " pair"],
    reference_error_w: Float[Tensor, " pair"],
    reference_error_l: Float[Tensor, " pair"],
    dpo_beta: float,
) -> Float[Tensor, " pair"]:
    """Log-odds, by the policy, that the winner is preferred; exchanging the images flips the sign.

    Paper: SAIL Eq. 9 (the argument of sigma), with the errors of `denoising_error`.
    """
    gain_w = policy_error_w - reference_error_w
    gain_l = policy_error_l - reference_error_l
    return -0.5 * dpo_beta * (gain_w - gain_l)


def dpo_loss(logit: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """-log sigmoid(logit) of each pair; ln 2 where policy equals reference. Paper: SAIL Eq. 3."""
    return -functional.logsigmoid(logit)
