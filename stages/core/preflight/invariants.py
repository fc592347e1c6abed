"""Whether the mathematics holds on this machine's devices: the reward, the loss, batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from stages.core.method.noising import generator, reward_draws, training_draws
from stages.core.method.objective import PairErrors, preference_logit
from stages.core.method.rewards import implicit_reward
from stages.core.method.scoring import Difference, draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser, LoraSettings
from stages.core.models.loading import ModelError
from stages.core.policies.encoding import EncodedPairs
from stages.core.preflight.findings import Findings
from stages.core.preflight.judge import in_precision
from stages.core.preflight.samples import PROMPTS, lora_settings, random_pairs
from stages.core.training.pair_losses import pair_errors
from stages.core.training.settings import TrainingSettings

TOLERANCE = {"float32": 1e-4, "tf32": 0.01, "bfloat16": 0.05, "float16": 0.01}
"""How far an image's error may move with its batch, relatively: rounding of each precision."""
DPO_BETA = 5000.0
PLAIN = TrainingSettings(
    dpo_beta=DPO_BETA, learning_rate=1.0, batch_pairs=2, passes=1.0, warmup_share=0.0, gradient_clip=1.0,
    weight_decay=0.0, caption_dropout=0.0,
)  # fmt: skip
"""Nothing is trained by it: errors are not weighted."""
EXCHANGED = 1e-5
"""How far a pair's exchange may move its errors in float32, relatively."""


def check_invariants(model: DiffusionModel, config: Mapping[str, Any], findings: Findings) -> None:
    """Policy equal to reference: reward 0, loss ln 2. Swapped: sign flipped. Batches: no matter."""
    findings.add("device", device_name(model.device), holds=True)
    check_vae(model, findings)
    judge = Difference(model.load_denoiser(), model.load_denoiser())
    shape = model.latents_shape
    latents = torch.randn((2, *shape), generator=generator(0))
    draws = reward_draws(1, num_draws=2, num_timesteps=model.num_timesteps, latents_shape=shape)
    text = model.encode_text(PROMPTS[:1])
    errors = draw_errors(model, judge, latents, text, draws)
    reward = implicit_reward(
        policy_errors=errors.policy.numpy(), reference_errors=errors.reference.numpy()
    ).reward
    findings.add(
        "reward of a policy that is its own reference", f"{reward.tolist()}", holds=not reward.any()
    )
    alone = draw_errors(model, judge, latents[:1], text, draws).policy
    change = float(((alone - errors.policy[:1]) / errors.policy[:1]).abs().max())
    findings.add(
        "an image's error alone and in a batch",
        f"differ by {change:.1e} of it", holds=change <= TOLERANCE[config["model"]["dtype"]],
    )  # fmt: skip
    check_training(model, lora_settings(config), findings)
    with in_precision(model, "float32") as exact:
        check_exchange(exact, lora_settings(config), findings)


def device_name(device: torch.device) -> str:
    """What computes."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads"


def check_vae(model: DiffusionModel, findings: Findings) -> None:
    """Encode a picture of gradients and decode it again; fails where numbers are not finite."""
    sides = [torch.linspace(-1, 1, side) for side in model.image_size]
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    picture = torch.stack([rows, columns, -rows])[None]
    try:
        decoded = model.decode_latents(model.encode_images(picture))
    except ModelError as error:
        findings.add("a picture through the VAE", str(error), holds=False)
        return
    apart = float((decoded - (picture / 2 + 0.5)).abs().mean()) * 255
    findings.add("a picture through the VAE", f"returns {apart:.1f} of 255 levels off", holds=True)


def check_training(model: DiffusionModel, lora: LoraSettings, findings: Findings) -> None:
    """As a training begins, in its own precision: loss ln 2."""
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    errors = errors_of(model, policy, reference, random_pairs(model, 2))
    loss = float(torch.nn.functional.softplus(-preference_logit(errors, DPO_BETA)).mean())
    findings.add(
        "DPO loss as training begins",
        f"{loss:.6f} (ln 2 is {math.log(2):.6f})", holds=abs(loss - math.log(2)) < 1e-6,
    )  # fmt: skip


def check_exchange(model: DiffusionModel, lora: LoraSettings, findings: Findings) -> None:
    """A policy that differs from its reference gives the exchanged pair the opposite logit.

    `model` is in float32: a narrower precision's rounding would be of the logits' own size.
    """
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.01 * weight.abs().mean() + 1e-4)
    pairs = random_pairs(model, 2)
    exchanged = replace(pairs, winner=pairs.loser, loser=pairs.winner)
    errors = errors_of(model, policy, reference, pairs)
    once = preference_logit(errors, DPO_BETA)
    turned = preference_logit(errors_of(model, policy, reference, exchanged), DPO_BETA)
    change = float((once + turned).abs().max()) / DPO_BETA
    size = float(torch.cat([errors.policy_w, errors.policy_l]).mean())
    findings.add(
        "logit of the exchanged pair",
        f"{turned.tolist()} for {once.tolist()}", holds=change <= EXCHANGED * size,
    )  # fmt: skip


def errors_of(
    model: DiffusionModel, policy: Denoiser, reference: Denoiser, pairs: EncodedPairs
) -> PairErrors:
    """The errors of a few pairs at fixed draws, in the training's arithmetic."""
    number = len(pairs)
    draws = training_draws(
        2, num_pairs=number, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )
    kept = torch.zeros(number, dtype=torch.bool)
    with torch.no_grad(), model.autocast():
        return pair_errors(
            model, policy, reference, pairs, torch.arange(number), draws, kept, PLAIN
        )
