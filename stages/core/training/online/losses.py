"""The loss of some transitions, and what is logged with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.core.method.gaussian_steps import log_probability, log_ratio
from stages.core.method.online_objective import (
    clipped_share,
    policy_gradient_loss,
    preference_loss,
)
from stages.core.method.trajectories import Chains
from stages.core.models.conditioning import Conditioning
from stages.core.training.online.settings import OnlineSettings
from stages.core.training.online.transitions import Transitions


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Whose steps are made likelier or less likely."""

    policy: Chains
    reference: Chains
    """ddpo never looks at it."""
    settings: OnlineSettings
    text: Conditioning
    """A row for each different caption."""

    def losses(self, some: Transitions) -> dict[str, Tensor]:
        """The loss of each item, and what is logged with it, one value an item or one of all."""
        if self.settings.method == "ddpo":
            return self._policy_gradient(some)
        return self._preference(some)

    def _preference(self, pairs: Transitions) -> dict[str, Tensor]:
        """SPO's and D3PO's. The reference goes first, as in `pair_losses`."""
        before, after = (
            values.transpose(0, 1).flatten(0, 1).to(self._device)
            for values in (pairs.before, pairs.after)
        )
        numbers = pairs.number.repeat(2)
        text = self._text(pairs).repeat(2)
        with torch.no_grad():
            reference = self.reference.step(before, numbers, text)
        policy = self.policy.step(before, numbers, text)
        ratio = log_ratio(after, policy, reference)
        winner, loser = ratio.chunk(2)
        loss = preference_loss(
            winner, loser,
            beta=self.settings.preference_beta, ratio_clip=self.settings.ratio_clip,
        )  # fmt: skip
        return {
            "loss": loss,
            "log_ratio": winner.mean(),
            "clipped_share": clipped_share(ratio, self.settings.ratio_clip),
            "implicit_accuracy": (winner > loser).float().mean(),
        }

    def _policy_gradient(self, some: Transitions) -> dict[str, Tensor]:
        before, after = (values[:, 0].to(self._device) for values in (some.before, some.after))
        step = self.policy.step(before, some.number, self._text(some))
        ratio = log_probability(after, step) - some.log_probability.to(self._device)
        loss = policy_gradient_loss(
            ratio, some.advantage.to(self._device), ratio_clip=self.settings.ratio_clip
        )
        return {
            "loss": loss,
            "log_ratio": ratio.mean(),
            "clipped_share": clipped_share(ratio, self.settings.ratio_clip),
        }

    @property
    def _device(self) -> torch.device:
        return self.policy.model.device

    def _text(self, some: Transitions) -> Conditioning:
        return self.text.rows(some.caption).to(self._device)
