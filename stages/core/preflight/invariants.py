"""Whether the mathematics holds on this machine's devices: the reward, the loss, batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from stages.core.method.noising import generator, reward_draws, training_draws
from stages.core.method.objective import preference_logit
from stages.core.method.rewards import implicit_reward
from stages.core.method.scoring import draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LoraSettings
from stages.core.policies.encoding import EncodedPairs
from stages.core.preflight.findings import Findings
from stages.core.preflight.samples import PROMPTS, lora_settings, random_pairs
from stages.core.training.pair_losses import pair_errors

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""How far an image's error may move with its batch, relatively: rounding of each precision."""


def check_invariants(model: DiffusionModel, config: Mapping[str, Any], findings: Findings) -> None:
    """Policy equal to reference: reward 0, loss ln 2. Swapped: sign flipped. Batches: no matter."""
    denoiser = model.load_denoiser()
    shape = model.latents_shape
    latents = torch.randn((2, *shape), generator=generator(0))
    draws = reward_draws(1, num_draws=2, num_timesteps=model.num_timesteps, latents_shape=shape)
    text = model.encode_text(PROMPTS[:1])
    errors = draw_errors(model, denoiser, denoiser, latents, text, draws)
    reward = implicit_reward(
        policy_errors=errors.policy.numpy(), reference_errors=errors.reference.numpy()
    ).reward
    findings.add(
        "reward of a policy that is its own reference", f"{reward.tolist()}", holds=not reward.any()
    )
    alone = draw_errors(model, denoiser, denoiser, latents[:1], text, draws).policy
    change = float(((alone - errors.policy[:1]) / errors.policy[:1]).abs().max())
    findings.add(
        "an image's error alone and in a batch",
        f"differ by {change:.1e} of it", holds=change <= TOLERANCE[config["model"]["dtype"]],
    )  # fmt: skip
    check_training(model, lora_settings(config), findings)


def check_training(model: DiffusionModel, lora: LoraSettings, findings: Findings) -> None:
    """As a training begins: loss ln 2, and the exchanged pair has the opposite logit."""
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    pairs, rows = random_pairs(model, 2), torch.arange(2)
    draws = training_draws(
        2, num_pairs=2, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )
    kept = torch.zeros(2, dtype=torch.bool)

    def logit(of: EncodedPairs) -> torch.Tensor:
        with torch.no_grad(), model.autocast():
            return preference_logit(
                pair_errors(model, policy, reference, of, rows, draws, kept), 5000.0
            )

    loss = float(torch.nn.functional.softplus(-logit(pairs)).mean())
    findings.add(
        "DPO loss as training begins",
        f"{loss:.6f} (ln 2 is {math.log(2):.6f})", holds=abs(loss - math.log(2)) < 1e-6,
    )  # fmt: skip
    with torch.no_grad():  # a policy that differs from its reference
        for weight in policy.parameters():
            weight.add_(0.01 * weight.abs().mean() + 1e-4)
    exchanged = replace(pairs, winner=pairs.loser, loser=pairs.winner)
    once, turned = logit(pairs), logit(exchanged)
    change = float(((once + turned) / once).abs().max())
    findings.add(
        "logit of the exchanged pair",
        f"{turned.tolist()} for {once.tolist()}", holds=change <= TOLERANCE[str(model.dtype)[6:]],
    )  # fmt: skip
