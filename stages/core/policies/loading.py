"""The denoisers of finished policies."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from stages.core.artifacts.provenance import BASE, policy_digest
from stages.core.method.derivative import Derivative
from stages.core.method.scoring import Difference, Judge
from stages.core.method.secant import Secant
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.policy import Policy

log = logging.getLogger(__name__)

RewardsBy = Literal["difference", "secant", "derivative"]
"""How a reward is had of two models: see method/scoring.py, secant.py and derivative.py."""


def finished(policy: str) -> Policy | None:
    """The policy in a folder, or None for 'base'. ArtifactError unless it is complete."""
    if policy == BASE:
        return None
    policy_digest(Path(policy))
    return Policy(Path(policy))


def load_denoiser(model: DiffusionModel, policy: str) -> Denoiser:
    """The denoiser of a finished policy folder, or the base model's for 'base'."""
    denoiser = model.load_denoiser(finished(policy))
    return denoiser.compile() if model.source.settings.compile else denoiser


def load_judge(
    model: DiffusionModel, policy: str, reference: str, rewards_by: RewardsBy = "difference"
) -> Judge:
    """What judges by a policy and its reference, of which either may be 'base'.

    For a difference they share one network where they differ by LoRA adapters only. A derivative is not
    compiled.
    """
    if rewards_by == "difference":
        denoisers = model.load_denoisers(finished(policy), finished(reference))
        if model.source.settings.compile:
            for denoiser in set(denoisers):
                denoiser.compile()
        return Difference(*denoisers)
    weights = [
        {name: value.data.cpu() for name, value in model.fused_network(each).named_parameters()}
        for each in (finished(policy), finished(reference))
    ]
    if rewards_by == "derivative":
        return Derivative.between(model.load_denoiser().network, *weights)
    secant = Secant.between(model, *weights)
    log.info(
        "rewards by a secant %g times as long as policy and reference are apart", secant.stretch
    )
    if model.source.settings.compile:
        secant.ahead.compile()
        secant.behind.compile()
    return secant
