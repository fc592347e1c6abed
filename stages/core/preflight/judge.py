"""Whether the precision that judges ranks images as float32 would, on the user's own model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from stages.core.artifacts.provenance import BASE, write_manifest
from stages.core.method.noising import reward_draws, training_draws
from stages.core.method.rewards import implicit_reward, share_moved
from stages.core.method.sampling import sample_latents
from stages.core.method.scoring import draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model, use_arithmetic
from stages.core.plan.run import RunPlan
from stages.core.policies.loading import RewardsBy, load_judge
from stages.core.policies.saving import save_policy
from stages.core.preflight.findings import Findings
from stages.core.preflight.samples import PROMPTS, encode_samples, lora_settings, random_pairs
from stages.core.training.attention import without_cudnn_attention
from stages.core.training.pair_losses import batch_loss
from stages.core.training.settings import TrainingSettings

CANDIDATES = 8
STEPS = 4
"""Sampler steps of the candidates: more would change nothing of the rounding."""
MAX_ROUNDING = 0.03
"""Of the rewards' spread. In benchmarks/precision.md best and worst are float32's in at least 95 % of the
prompts up to there, save where the policy is three times as far as policy 0."""
SHARE_OF_RATES = 0.05
"""How far each weight is moved, of the sum of the learning rates: all of them along one gradient, so that
in the embedded world the rewards are about as far above rounding as those of its trained policy 0."""


def check_judge(model: DiffusionModel, config: Mapping[str, Any], findings: Findings) -> None:
    """Judge some candidates by a policy that was moved a little, as the config says and in float32.

    Nothing to do where the config asks for just that.
    """
    block = config["score_candidates"]
    rewards_by, dtype = block["rewards_by"], block["dtype"]
    is_exact = dtype == "float32" or (dtype == "tf32" and model.device.type != "cuda")
    if is_exact and rewards_by == "difference":
        return
    with (
        TemporaryDirectory() as folder,
        in_precision(model, "float32") as exact,
    ):
        policy = move_a_little(exact, config, Path(folder))
        latents = candidates(exact, config)
        expected = rewards(exact, str(policy), latents, "difference", config)
        with in_precision(model, dtype) as judging:
            found = rewards(judging, str(policy), latents, rewards_by, config)
    share = share_moved(found, expected)
    same = (found.argmax(1) == expected.argmax(1)) & (found.argmin(1) == expected.argmin(1))
    text = (
        f"by {rewards_by} in {dtype}, rewards of a policy near its base move by {share:.2%} of their spread "
        f"beside float32; {same.sum()} of {len(same)} prompts have the same best and worst"
    )
    remedy = "; set score_candidates.rewards_by to secant or derivative, or score_candidates.dtype to tf32 or float32"
    is_right = share <= MAX_ROUNDING
    findings.add("the judge's precision", text + ("" if is_right else remedy), holds=is_right)


@contextmanager
def in_precision(model: DiffusionModel, dtype: Any) -> Iterator[DiffusionModel]:
    """The same model in another precision; after it torch multiplies as the first one asks."""
    try:
        other = load_model(replace(model.source.settings, dtype=dtype), device=model.device)
        encode_samples(other)
        yield other
    finally:
        use_arithmetic(model.source.settings)


@without_cudnn_attention()
def move_a_little(model: DiffusionModel, config: Mapping[str, Any], folder: Path) -> Path:
    """A policy folder: the base after the seed training's distance in the direction of one gradient."""
    block = {
        k: v
        for k, v in config["train_seed"].items()
        if k not in ("reference", "policy", "use_decisions")
    }
    settings = TrainingSettings(**block)
    policy, reference = model.load_for_training(None, None, lora_settings(config), seed=0)
    parameters = policy.trainable()
    policy.network.enable_gradient_checkpointing()
    pairs = random_pairs(model, 1)
    draws = training_draws(
        2, num_pairs=1, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )
    kept, row = torch.zeros(1, dtype=torch.bool), torch.arange(1)
    measures = batch_loss(model, policy, reference, pairs, row, draws, settings, kept)
    measures["loss"].backward()  # type: ignore[no-untyped-call]
    num_steps = (
        (config["preferences"]["num_pairs"] or 1000) * settings.passes / settings.batch_pairs
    )
    distance = SHARE_OF_RATES * settings.learning_rate * num_steps
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(distance * parameter.grad.sign())
    policy.freeze().network.disable_gradient_checkpointing()
    save_policy(policy, folder, model.denoiser_part)
    write_manifest(folder, stage="preflight", arguments={}, inputs=[], facts={"base": model.base})
    return folder


def candidates(model: DiffusionModel, config: Mapping[str, Any]) -> torch.Tensor:
    """Latents of some candidates of each prompt, after a few steps."""
    denoiser, sampling = model.load_denoiser(), RunPlan(config=config).candidate_sampling
    return torch.stack(
        [
            sample_latents(
                model, denoiser, text=model.encode_text([prompt]).repeat(CANDIDATES),
                unconditional=model.unconditional(), seeds=list(range(CANDIDATES)),
                sampler=sampling["sampler"], num_inference_steps=STEPS,
                guidance_scale=sampling["guidance_scale"],
            ).cpu()
            for prompt in PROMPTS
        ]
    )  # fmt: skip


def rewards(
    model: DiffusionModel,
    policy: str,
    latents: torch.Tensor,
    rewards_by: RewardsBy,
    config: Mapping[str, Any],
) -> np.ndarray:
    """The reward of each candidate of each prompt."""
    judge, found = load_judge(model, policy, BASE, rewards_by), []
    for number, prompt in enumerate(PROMPTS):
        draws = reward_draws(
            number, num_draws=config["score_candidates"]["num_draws"],
            num_timesteps=model.num_timesteps, latents_shape=model.latents_shape,
            law=config["score_candidates"]["draw_law"],
        )  # fmt: skip
        text = model.encode_text([prompt])
        text = model.tell_guidance(text, float(config["score_candidates"]["embedded_guidance"]))
        errors = draw_errors(
            model, judge, latents[number], text, draws,
            rows_per_batch=config["execution"]["score_rows_per_batch"],
        )  # fmt: skip
        found.append(
            implicit_reward(
                policy_errors=errors.policy.numpy(), reference_errors=errors.reference.numpy()
            ).reward
        )
    return np.array(found)
