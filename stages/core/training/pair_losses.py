"""The loss of policy and reference on some encoded pairs, or on single likes."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.core.method.listwise import Lists, listwise_loss
from stages.core.method.noising import Draws
from stages.core.method.objective import (
    LOSSES,
    LikeErrors,
    LossSettings,
    PairErrors,
    denoising_error,
    like_loss,
    like_weights,
    mean_gain,
    mean_like_gain,
    preference_logit,
    wrong_shares,
)
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.policies.encoding import EncodedLikes, EncodedPairs
from stages.core.training.settings import TrainingSettings


def batch_loss(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    pairs: EncodedPairs | EncodedLikes,
    rows: Int[Tensor, " chosen"],
    draws: Draws,
    settings: TrainingSettings,
    dropped: Bool[Tensor, " chosen"],
    gain_of_batch: float = 0.0,
) -> dict[str, Tensor]:
    """The mean loss of some pairs and what is logged with it; winner and loser share their draw.

    Where pairs make lists, `rows` are lists, the loss is their mean, and all images of a list share its draw.
    Single likes have a draw each.
    Captions are left out where `dropped` is true. The reference predicts first: what is computed
    twice by gradient checkpointing must see the policy's adapter.
    """
    if isinstance(pairs, EncodedLikes):
        likes = like_errors(model, policy, reference, pairs, rows, draws, dropped, settings)
        return like_measures(likes, pairs.share_liked, settings, gain_of_batch)
    if pairs.lists is not None:
        rows, owner = pairs.lists.members(rows)
        draws, dropped = Draws(draws.timesteps[owner], draws.noise[owner]), dropped[owner]
    errors = pair_errors(model, policy, reference, pairs, rows, draws, dropped, settings)
    logit = preference_logit(errors, settings.dpo_beta)
    if pairs.lists is not None:
        loss = list_losses(errors, pairs.lists, rows, owner, settings.dpo_beta)
    else:
        loss = pair_losses(errors, model, pairs, rows, settings, gain_of_batch)
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
    gain_of_batch: float,
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
            mean_gain=gain_of_batch,
            liked_share=settings.kto_liked_share,
        ),
    )


def like_measures(
    errors: LikeErrors, share_liked: float, settings: TrainingSettings, gain_of_batch: float
) -> dict[str, Tensor]:
    """The mean loss of some likes and what is logged with it.

    implicit_accuracy is the share of images on the right side of the batch's mean gain. winner_error is of the liked
    images and loser_error of the disliked ones: each is a sum over the batch's, divided by how many it has on
    average, so that parts of a batch add up; logit is theirs as of a pair.
    """
    sign = torch.where(errors.is_liked, 1.0, -1.0)
    is_right = sign * (errors.gain - max(0.0, gain_of_batch)) > 0
    liked = errors.is_liked.float()
    winner_error = (-errors.gain * liked).mean() / share_liked
    loser_error = (-errors.gain * (1 - liked)).mean() / (1 - share_liked)
    return {
        "loss": like_loss(errors, settings.dpo_beta, gain_of_batch).mean(),
        "implicit_accuracy": is_right.float().mean(),
        "logit": settings.dpo_beta / 2 * (loser_error - winner_error),
        "winner_error": winner_error,
        "loser_error": loser_error,
    }


def gain_of(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    pairs: EncodedPairs | EncodedLikes,
    rows: Int[Tensor, " chosen"],
    draws: Draws,
    dropped: Bool[Tensor, " chosen"],
    settings: TrainingSettings,
) -> Float[Tensor, ""]:
    """The mean gain of some pairs or single likes, with which KTO compares each image's."""
    asked = (rows, draws, dropped, settings)
    if isinstance(pairs, EncodedLikes):
        return mean_like_gain(like_errors(model, policy, reference, pairs, *asked))
    errors = pair_errors(model, policy, reference, pairs, *asked)
    return mean_gain(errors, settings.kto_liked_share)


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
    captions = torch.where(dropped, len(pairs.text) - 1, pairs.caption[rows])
    text = pairs.text.rows(captions).to(model.device)
    if pairs.loser_caption is None:
        text = text.repeat(2)
    else:
        others = torch.where(dropped, len(pairs.text) - 1, pairs.loser_caption[rows])
        text = text.join(pairs.text.rows(others).to(model.device))
    policy_error, reference_error = image_errors(
        model, policy, reference,
        torch.cat([pairs.winner[rows], pairs.loser[rows]]),
        text,
        torch.cat([pairs.winner_geometry[rows], pairs.loser_geometry[rows]]),
        Draws(draws.timesteps.repeat(2), torch.cat([draws.noise] * 2)),
        settings,
        known,
    )  # fmt: skip
    return PairErrors(*policy_error.chunk(2), *reference_error.chunk(2))


def like_errors(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    likes: EncodedLikes,
    rows: Int[Tensor, " chosen"],
    draws: Draws,
    dropped: Bool[Tensor, " chosen"],
    settings: TrainingSettings,
) -> LikeErrors:
    """Weighted errors of policy and reference on some single likes, each with its own draw."""
    captions = torch.where(dropped, len(likes.text) - 1, likes.caption[rows])
    policy_error, reference_error = image_errors(
        model, policy, reference, likes.latents[rows], likes.text.rows(captions).to(model.device),
        likes.geometry[rows], draws, settings,
    )  # fmt: skip
    is_liked = likes.is_liked[rows].to(model.device)
    return LikeErrors(
        policy=policy_error,
        reference=reference_error,
        is_liked=is_liked,
        weight=like_weights(is_liked, settings.kto_liked_share, likes.share_liked),
    )


def image_errors(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    latents: Float[Tensor, "image ..."],
    text: Conditioning,
    geometry: Int[Tensor, "image six"],
    draws: Draws,
    settings: TrainingSettings,
    known: Float[Tensor, " image"] | None = None,
) -> tuple[Float[Tensor, " image"], Float[Tensor, " image"]]:
    """Weighted errors of policy and reference on some images; a missing reference's are 0, `known` ones are kept."""
    device, dtype = model.device, latents.dtype
    context = model.place(text, geometry.to(device))
    context = model.tell_guidance(context, float(settings.embedded_guidance))
    noise, timesteps = draws.noise.to(device, dtype), draws.timesteps.to(device)
    latents = latents.to(device, dtype)
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
    return policy_error, reference_error
