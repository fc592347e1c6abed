"""The loss of policy and reference on some encoded pairs."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.core.method.listwise import Lists, listwise_loss
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
    mean_gain: float = 0.0,
) -> dict[str, Tensor]:
    """The mean loss of some pairs and what is logged with it; winner and loser share their draw.

    Where pairs make lists, `rows` are lists, the loss is their mean, and all images of a list share its draw.
    Captions are left out where `dropped` is true. The reference predicts first: what is computed
    twice by gradient checkpointing must see the policy's adapter.
    """
    if pairs.lists is not None:
        rows, owner = pairs.lists.members(rows)
        draws, dropped = Draws(draws.timesteps[owner], draws.noise[owner]), dropped[owner]
    errors = pair_errors(model, policy, reference, pairs, rows, draws, dropped, settings)
    logit = preference_logit(errors, settings.dpo_beta)
    if pairs.lists is not None:
        loss = list_losses(errors, pairs.lists, rows, owner, settings.dpo_beta)
    else:
        loss = pair_losses(errors, model, pairs, rows, settings, mean_gain)
    return {
        "loss": loss.mean(),
        "implicit_accuracy": (logit > 0).float().mean(),
        "logit": logit.mean(),
        "winner_error": (errors.policy_w - errors.reference_w).mean(),
        "loser_error": (errors.policy_l - errors.reference_l).mean(),
    }


def pair_losses(
    errors: PairErrors,
    model: DiffusionModel,
    pairs: EncodedPairs,
    rows: Int[Tensor, " chosen"],
    settings: TrainingSettings,
    mean_gain: float,
) -> Float[Tensor, " chosen"]:
    """The loss of each pair."""
    return LOSSES[settings.loss](
        errors,
        LossSettings(
            dpo_beta=settings.dpo_beta,
            label_smoothing=wrong_shares(
                None
                if pairs.probability is None
                else pairs.probability[rows].to(errors.policy_w.device),
                settings.label_smoothing,
            ),
            num_timesteps=model.num_timesteps,
            mean_gain=mean_gain,
            liked_share=settings.kto_liked_share,
        ),
    )


def list_losses(
    errors: PairErrors,
    lists: Lists,
    rows: Int[Tensor, " chosen"],
    owner: Int[Tensor, " chosen"],
    dpo_beta: float,
) -> Float[Tensor, " list"]:
    """The loss of each list whose pairs stand at `rows`, by its place in `owner`."""
    device = errors.policy_w.device
    preference = torch.cat([lists.winner[rows], lists.loser[rows]]).to(device)
    policy = torch.cat([errors.policy_w, errors.policy_l])
    reference = torch.cat([errors.reference_w, errors.reference_l])
    both = owner.repeat(2)
    found = []
    for number in range(int(owner.max()) + 1):
        own = (both == number).nonzero().squeeze(1).to(device)
        found.append(listwise_loss(policy[own], reference[own], preference[own], dpo_beta))
    return torch.stack(found)


def pair_errors(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    pairs: EncodedPairs,
    rows: Int[Tensor, " chosen"],
    draws: Draws,
    dropped: Bool[Tensor, " chosen"],
    settings: TrainingSettings,
    known: Float[Tensor, " both"] | None = None,
) -> PairErrors:
    """Weighted errors of policy and reference on both images of some pairs; a missing reference's are 0.

    `known` are the reference's weighted ones on all winners, then all losers, where the same draws were asked about before.
    """
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
    if known is not None:
        reference_error = known
    elif reference is None:
        reference_error = torch.zeros(len(noised), device=device)
    else:
        with torch.no_grad():
            prediction = model.predict(reference, noised, timesteps, context)
            reference_error = denoising_error(prediction, target)
    policy_error = denoising_error(model.predict(policy, noised, timesteps, context), target)
    if settings.weights != "uniform":
        weights = model.error_weights(settings.weights).to(device)[timesteps]
        policy_error = policy_error * weights
        reference_error = reference_error if known is not None else reference_error * weights
    return PairErrors(*policy_error.chunk(2), *reference_error.chunk(2))
