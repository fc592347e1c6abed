"""A step of the training of a step-aware preference model, timed at the config's batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from stages.core.method.noising import training_draws
from stages.core.method.step_preference import step_preference_loss
from stages.core.models.adapter import DiffusionModel
from stages.core.plan.costs import StepJudgeRates
from stages.core.preflight.clock import memory, moment_bytes, seconds
from stages.core.preflight.findings import Findings
from stages.core.preflight.samples import PROMPTS, random_pairs
from stages.core.training.attention import without_cudnn_attention
from stages.core.training.optimizers import make_optimizer
from stages.core.training.step_judge.estimates import Estimates
from stages.core.training.step_judge.scores import scores_of_pairs
from stages.core.training.step_judge.settings import StepJudgeSettings, TrainableJudge


@without_cudnn_attention()
def time_step_judge(
    model: DiffusionModel, judge: TrainableJudge, config: Mapping[str, Any], findings: Findings
) -> StepJudgeRates:
    """Seconds of a pair: seen by the base at a random timestep, decoded, judged and trained on."""
    settings, execution = step_judge_settings(config), config["execution"]
    estimates = Estimates.of(model, model.unconditional(), settings.guidance_scale)
    batch = settings.batch_pairs
    number = min(batch, execution["micro_batch_pairs"] or batch)
    pairs, rows = random_pairs(model, number), torch.arange(number)
    draws = training_draws(
        4, num_pairs=number, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )
    if execution["gradient_checkpointing"]:
        judge.network.network.enable_gradient_checkpointing()
    parameters = judge.network.trainable()
    optimizer = make_optimizer(
        settings.optimizer, parameters, learning_rate=1e-9, weight_decay=settings.weight_decay
    )
    label = torch.ones(number, device=model.device)

    def micro_batch() -> None:
        if settings.labels == "clip":  # a copy that is not trained looks at the finished images
            with torch.no_grad():
                scores_of_pairs(judge, estimates, pairs, PROMPTS[:1] * number, rows, None)
        first, second = scores_of_pairs(judge, estimates, pairs, PROMPTS[:1] * number, rows, draws)
        loss = step_preference_loss(first, second, label).mean()
        loss.backward()  # type: ignore[no-untyped-call]

    micro_batch()
    optimizer.step()
    pair = seconds(model, micro_batch) / number + seconds(model, optimizer.step) / batch
    memory(model, f"training of the step judge, {number} pairs at once", findings)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return StepJudgeRates(
        train_pair=pair, weight_bytes=weights, trained_bytes=weights + moment_bytes(optimizer)
    )


def step_judge_settings(config: Mapping[str, Any]) -> StepJudgeSettings:
    """The config's block step_judge, save where it begins and how often it is looked at."""
    known, block = fields(StepJudgeSettings), config["step_judge"]
    values = {field.name: block[field.name] for field in known}
    values |= {field.name: float(block[field.name]) for field in known if field.type == "float"}
    return StepJudgeSettings(**values)
