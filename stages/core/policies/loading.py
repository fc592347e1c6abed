"""The denoisers of finished policies."""

from __future__ import annotations

from pathlib import Path

from stages.core.artifacts.provenance import BASE, policy_digest
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.policy import Policy


def finished(policy: str) -> Policy | None:
    """The policy in a folder, or None for 'base'. ArtifactError unless it is complete."""
    if policy == BASE:
        return None
    policy_digest(Path(policy))
    return Policy(Path(policy))


def load_denoiser(model: DiffusionModel, policy: str) -> Denoiser:
    """The denoiser of a finished policy folder, or the base model's for 'base'."""
    return model.load_denoiser(finished(policy))


def load_denoisers(model: DiffusionModel, policy: str, reference: str) -> tuple[Denoiser, Denoiser]:
    """(policy, reference), which share one network where they differ by LoRA adapters only."""
    return model.load_denoisers(finished(policy), finished(reference))
