"""The Diffusion-DPO objective and its variants, as functions of denoising errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

LossName = Literal["sigmoid", "ipo", "mapo", "kto"]

MAPO_SNR = 0.5
"""The constant in MaPO's odds (its published code)."""
MAPO_WEIGHT = 0.1
"""Weight of MaPO's ratio term (its published code)."""


@dataclass(frozen=True)
class PairErrors:
    """Denoising errors of a batch of pairs; winner and loser share timestep and noise."""

    policy_w: Float[Tensor, " pair"]
    policy_l: Float[Tensor, " pair"]
    reference_w: Float[Tensor, " pair"]
    reference_l: Float[Tensor, " pair"]


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What turns errors into a loss."""

    dpo_beta: float
    """Strength of the pull towards the reference, with mean errors (paper: 5000)."""
    label_smoothing: float | Float[Tensor, " pair"]
    """Share of labels taken to be wrong (cDPO), of all pairs or of each; 0 trusts them all (paper)."""
    num_timesteps: int
    """Length of the noise schedule, which MaPO multiplies its margin by."""
    mean_gain: float = 0.0
    """Of all images of a batch (`mean_gain`), which KTO compares each one's with."""
    liked_share: float = 0.5
    """How much liked images count in KTO's loss; the others count the rest."""


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


def preference_logit(errors: PairErrors, dpo_beta: float) -> Float[Tensor, " pair"]:
    """Log-odds, by the policy, that the winner is preferred; exchanging the images flips the sign.

    Paper: SAIL Eq. 9 (the argument of sigma), with the errors of `denoising_error`.
    """
    gain_w = errors.policy_w - errors.reference_w
    gain_l = errors.policy_l - errors.reference_l
    return -0.5 * dpo_beta * (gain_w - gain_l)


def dpo_loss(errors: PairErrors, settings: LossSettings) -> Float[Tensor, " pair"]:
    """-log sigmoid(logit) of each pair; ln 2 where policy equals reference. Paper: SAIL Eq. 3.

    With label smoothing s, (1 - s) of it and s of the exchanged pair's: conservative DPO, Mitchell,
    "A note on DPO with noisy preferences", Eq. 3. A soft label p is s = 1 - p of its pair: the expected loss
    where the winner is preferred with probability p, least at a logit of log p/(1 - p).
    """
    logit, share = preference_logit(errors, settings.dpo_beta), settings.label_smoothing
    if not isinstance(share, Tensor) and share == 0:
        return -functional.logsigmoid(logit)
    return -(1 - share) * functional.logsigmoid(logit) - share * functional.logsigmoid(-logit)


def ipo_loss(errors: PairErrors, settings: LossSettings) -> Float[Tensor, " pair"]:
    """(logit - 1/2)^2 of each pair, least where the logit is 1/2; 1/4 where policy equals reference.

    Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences",
    Eq. 17, (h - 1 / (2 tau))^2 with h = logit / dpo_beta and tau = dpo_beta, times dpo_beta^2: the
    same minimum, and gradients as large as the sigmoid loss's instead of 1e-7 of them.
    """
    return (preference_logit(errors, settings.dpo_beta) - 0.5).square()


def mapo_loss(errors: PairErrors, settings: LossSettings) -> Float[Tensor, " pair"]:
    """Error of the winner, less a tenth of the log-sigmoid of a margin of odds; no reference.

    Hong et al., "Margin-aware Preference Optimization for Aligning Diffusion Models without
    Reference", with the constants of its published code: odds of an error e are u / (exp(u) - 1)
    with u = e / 2, and their difference is multiplied by the number of timesteps.
    """

    def odds(error: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        return MAPO_SNR * error / torch.expm1(MAPO_SNR * error)

    margin = odds(errors.policy_w) - odds(errors.policy_l)
    ratio = functional.logsigmoid(settings.num_timesteps * margin)
    return errors.policy_w - MAPO_WEIGHT * ratio


def mean_gain(errors: PairErrors, liked_share: float = 0.5) -> Float[Tensor, ""]:
    """How much smaller the policy's errors are than the reference's, on average over both images of the pairs.

    `liked_share` is how much the winners count in it.
    """
    gain_w = errors.reference_w - errors.policy_w
    gain_l = errors.reference_l - errors.policy_l
    return liked_share * gain_w.mean() + (1 - liked_share) * gain_l.mean()


def kto_loss(errors: PairErrors, settings: LossSettings) -> Float[Tensor, " pair"]:
    """1 - sigmoid(+-dpo_beta (gain - base)), of winner (+) and loser (-); 1/2 where policy equals reference.

    An image's gain is the reference's error minus the policy's; base is the batch's mean gain, 0 if that is
    negative, and has no gradient. Each image counts by itself, as one that is liked or one that is not. Li et
    al., "Aligning Diffusion Models by Optimizing Human Utility", Eq. 8, with the mean errors, the weights of 1
    and the sigmoid of its published code. Differs from it: it draws `liked_share` of a batch from the liked images, and
    here they count so much. The expected loss is the same.
    """
    base = max(0.0, settings.mean_gain)
    liked = torch.sigmoid(settings.dpo_beta * (errors.reference_w - errors.policy_w - base))
    disliked = torch.sigmoid(-settings.dpo_beta * (errors.reference_l - errors.policy_l - base))
    share = settings.liked_share
    return 1 - (share * liked + (1 - share) * disliked)


@dataclass(frozen=True)
class LikeErrors:
    """Denoising errors of a batch of single images, each with a draw of its own, and what a person said of it."""

    policy: Float[Tensor, " image"]
    reference: Float[Tensor, " image"]
    is_liked: Bool[Tensor, " image"]
    weight: Float[Tensor, " image"]
    """How much each image counts (`like_weights`)."""

    @property
    def gain(self) -> Float[Tensor, " image"]:
        """How much smaller the policy's error is than the reference's: the implicit reward of the draw."""
        return self.reference - self.policy


def like_weights(
    is_liked: Bool[Tensor, " image"], liked_share: float, share_liked: float
) -> Float[Tensor, " image"]:
    """How much each image counts, where `share_liked` of all are liked and `liked_share` is to count so.

    The mean over all images is 1. Of liked images alone it is liked_share / share_liked.
    """
    liked = liked_share / share_liked
    disliked = (1 - liked_share) / (1 - share_liked)
    return torch.where(is_liked, liked, disliked)


def mean_like_gain(errors: LikeErrors) -> Float[Tensor, ""]:
    """The weighted mean gain of a batch of single images; see `mean_gain`."""
    return (errors.weight * errors.gain).mean()


def like_loss(errors: LikeErrors, dpo_beta: float, mean_gain: float) -> Float[Tensor, " image"]:
    """Each image's weight times 1 - sigmoid(+-dpo_beta (gain - base)), of liked (+) and disliked (-) ones.

    base is the batch's mean gain, 0 if that is negative, and has no gradient. With policy equal to reference the
    mean over all images is 1/2. Li et al., "Aligning Diffusion Models by Optimizing Human Utility", Eq. 8. Differs
    from its code: that draws four liked images in five, and here every image comes equally often and counts by its
    weight. The expected loss is the same, and that of `kto_loss` where each pair is a liked and a disliked image.
    """
    base = max(0.0, mean_gain)
    sign = torch.where(errors.is_liked, 1.0, -1.0)
    return errors.weight * (1 - torch.sigmoid(sign * dpo_beta * (errors.gain - base)))


LOSSES: dict[LossName, Callable[[PairErrors, LossSettings], Float[Tensor, " pair"]]] = {
    "sigmoid": dpo_loss,
    "ipo": ipo_loss,
    "mapo": mapo_loss,
    "kto": kto_loss,
}
"""The loss of each pair, by name."""


def wrong_shares(
    probability: Float[Tensor, " pair"] | None, label_smoothing: float
) -> float | Float[Tensor, " pair"]:
    """How likely each label is wrong, where smoothing takes a share of all labels to be exchanged.

    `probability` that the winner is preferred; None trusts every label but for the smoothing.
    """
    if probability is None:
        return label_smoothing
    return label_smoothing + (1 - 2 * label_smoothing) * (1 - probability)


OF_A_WHOLE_BATCH: tuple[LossName, ...] = ("kto",)
"""Losses that need the batch's mean gain before any image's loss."""

WITHOUT_REFERENCE: tuple[LossName, ...] = ("mapo",)
"""Losses that never look at the reference."""
