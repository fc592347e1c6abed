"""The losses of online methods, as functions of log-ratios of step probabilities; and what rewards are worth.

SPO: Liang et al., "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step
Preference Optimization". DDPO: Black et al., "Training Diffusion Models with Reinforcement Learning". D3PO: Yang
et al., "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model". Constants and clips are
those of their published code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

PerRow = Float[Tensor, " row"]
PerReward = Float[np.ndarray, " reward"]

SMALL = 1e-6
"""What DDPO's code adds to a standard deviation."""


def is_clear(best: float, worst: float, min_gap: float) -> bool:
    """Whether a judge prefers the best to the worst by more than `min_gap`, a difference of probabilities.

    The probabilities are the softmax of the two scores, so their difference is tanh((best - worst)/2). SPO
    trains on no others.
    """
    return bool(np.tanh((best - worst) / 2) > min_gap)


def preference_loss(
    log_ratio_w: PerRow, log_ratio_l: PerRow, *, beta: float, ratio_clip: float
) -> PerRow:
    """-log sigmoid(beta (log rho_w - log rho_l)) of pairs of steps; ln 2 where policy equals reference.

    rho is the ratio of the step's probabilities under policy and reference, kept within 1 - clip and 1 + clip;
    outside it has no gradient. SPO, Eq. 12, and D3PO, Eq. 17, with the clip of their published code.
    """
    logit = clipped_log(log_ratio_w, ratio_clip) - clipped_log(log_ratio_l, ratio_clip)
    return -functional.logsigmoid(beta * logit)


def clipped_log(log_ratio: PerRow, ratio_clip: float) -> PerRow:
    """The logarithm of a ratio that is kept within 1 - clip and 1 + clip."""
    return log_ratio.clamp(np.log1p(-ratio_clip), np.log1p(ratio_clip))


def policy_gradient_loss(log_ratio: PerRow, advantage: PerRow, *, ratio_clip: float) -> PerRow:
    """max(-A rho, -A clamp(rho, 1 - clip, 1 + clip)) of each step; -A where nothing has been trained yet.

    rho is the ratio of the step's probabilities now and when it was sampled. DDPO, Sec. 4.3 (importance
    sampling with PPO's clip).
    """
    ratio = log_ratio.exp()
    return torch.maximum(
        -advantage * ratio, -advantage * ratio.clamp(1 - ratio_clip, 1 + ratio_clip)
    )


def clipped_share(log_ratio: PerRow, ratio_clip: float) -> Float[Tensor, ""]:
    """Share of rows whose ratio lies outside of 1 - clip and 1 + clip."""
    return ((log_ratio.exp() - 1).abs() > ratio_clip).float().mean()


class PromptStatistics:
    """The last rewards of every prompt, by which a reward is found good or bad for its prompt."""

    def __init__(self, buffer_size: int, min_count: int) -> None:
        """`buffer_size` 0 compares every reward with those of its own round only."""
        self.buffer_size, self.min_count = buffer_size, min_count
        self.rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: PerReward) -> PerReward:
        """(reward - mean) / (standard deviation + 1e-6) of each of a round's rewards, which are kept.

        Of the prompt's last `buffer_size` rewards, these included, where it has at least `min_count`; else of
        the round's. DDPO, Appendix D.2, as its published code does it.
        """
        self.keep(prompts, rewards)
        everything = rewards.astype(np.float64)
        found = np.empty(len(rewards))
        for place, prompt in enumerate(prompts):
            own = self.rewards.get(prompt, ())
            is_known = bool(self.buffer_size) and len(own) >= self.min_count
            base = np.asarray(own) if is_known else everything
            found[place] = (everything[place] - base.mean()) / (base.std() + SMALL)
        return found

    def keep(self, prompts: Sequence[str], rewards: PerReward) -> None:
        """Remember a round's rewards."""
        if self.buffer_size:
            for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
                own = self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size))
                own.append(reward)
