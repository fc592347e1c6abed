"""The loss of policy and reference on some encoded pairs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from stages.core.method.noising import Draws
from stages.core.method.objective import (
    LOSSES,
    LossSettings,
    PairErrors,
    denoising_error,
    preference_logit,
    wrong_shares,
)
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.policies.encoding import EncodedPairs
from stages.core.training.settings import TrainingSettings


def batch_loss(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    pairs: EncodedPairs,
    rows: Int[Tensor, " chosen"],
    draws: Draws,
    settings: TrainingSettings,
    dropped: Bool[Tensor, " chosen"],
) -> dict[str, Tensor]:
    """The mean loss of some pairs and what is logged with it; winner and loser share their draw.

    Captions are left out where `dropped` is true. The reference predicts first: what is computed
    twice by gradient checkpointing must see the policy's adapter.
    """
    errors = pair_errors(model, policy, reference, pairs, rows, draws, dropped, settings)
    logit = preference_logit(errors, settings.dpo_beta)
    loss = LOSSES[settings.loss](
        errors,
        LossSettings(
            dpo_beta=settings.dpo_beta,
            label_smoothing=wrong_shares(
                None if pairs.probability is None else pairs.probability[rows].to(logit.device),
                settings.label_smoothing,
            ),
            num_timesteps=model.num_timesteps,
        ),
    )
    return {
        "loss": loss.mean(),
        "implicit_accuracy": (logit > 0).float().mean(),
        "logit": logit.mean(),
        "winner_error": (errors.policy_w - errors.reference_w).mean(),
        "loser_error": (errors.policy_l - errors.reference_l).mean(),
    }


def pair_errors(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    pairs: EncodedPairs,
    rows: Int[Tensor, " chosen"],
    draws: Draws,
    dropped: Bool[Tensor, " chosen"],
    settings: TrainingSettings,
) -> PairErrors:
    """Weighted errors of policy and reference on both images of some pairs; a missing reference's are 0."""
    device, dtype = model.device, pairs.winner.dtype
    captions = torch.where(dropped, len(pairs.text) - 1, pairs.caption[rows])
    geometry = torch.cat([pairs.winner_geometry[rows], pairs.loser_geometry[rows]])
    context = model.place(pairs.text.rows(captions).to(device).repeat(2), geometry.to(device))
    context = model.tell_guidance(context, float(settings.embedded_guidance))
    noise = torch.cat([draws.noise.to(device, dtype)] * 2)
    timesteps = draws.timesteps.to(device).repeat(2)
    latents = torch.cat([pairs.winner[rows], pairs.loser[rows]]).to(device, dtype)
    noised = model.add_noise(latents, noise, timesteps)
    target = model.target(latents, noise, timesteps)
    if reference is None:
        reference_error = torch.zeros(len(noised), device=device)
    else:
        with torch.no_grad():
            prediction = model.predict(reference, noised, timesteps, context)
            reference_error = denoising_error(prediction, target)
    policy_error = denoising_error(model.predict(policy, noised, timesteps, context), target)
    if settings.weights != "uniform":
        weights = model.error_weights(settings.weights).to(device)[timesteps]
        policy_error, reference_error = policy_error * weights, reference_error * weights
    return PairErrors(*policy_error.chunk(2), *reference_error.chunk(2))
