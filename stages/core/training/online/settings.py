"""What decides an online training's result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stages.core.errors import UserError
from stages.core.method.noising import DrawLaw
from stages.core.policies.loading import RewardsBy
from stages.core.training.optimizers import OptimizerName

Method = Literal["spo", "ddpo", "d3po"]

SELF = "self"
"""The judge that is SAIL's implicit reward."""
SPM = "spm"
"""The judge that is the published step-aware preference model."""


@dataclass(frozen=True, kw_only=True)
class OnlineSettings:
    """Everything about sampling and optimisation that changes the policy."""

    method: Method
    """'spo': pools of candidates at every step. 'ddpo': policy gradient on whole chains. 'd3po': the best and
    the worst of whole chains."""
    rounds: int
    """Rounds of sampling and training."""
    prompts_per_update: int
    """Prompts of a round; a multiple of the number of processes."""
    candidates_per_prompt: int
    """spo: candidates of a pool (SD1.5: 4, SDXL: 2). d3po: chains of a prompt (2). ddpo: images of a prompt (1)."""
    num_inference_steps: int
    """Steps of DDIM with eta 1 (spo and d3po: 20, ddpo: 50), or of the flow's stochastic equation (Flow-GRPO: 10)."""
    guidance_scale: float
    """Weight of classifier-free guidance, in sampling and in training (all: 5); 1 is none."""
    learning_rate: float
    """Of the optimizer, constant (spo: 6e-5 for SD1.5, 1e-5 for SDXL; ddpo: 3e-4 with LoRA; d3po: 3e-5)."""
    batch_transitions: int
    """spo, d3po: pairs of transitions of an optimizer step. ddpo: transitions, whole images at a time."""
    ratio_clip: float
    """How far the ratio of probabilities may be from 1 (spo, d3po: 0.1; ddpo: 1e-4)."""
    preference_beta: float = 10.0
    """spo, d3po: factor of the difference of log-ratios (spo: 10, d3po: 0.1)."""
    min_preference_gap: float = 0.0
    """spo, d3po: least difference of the two probabilities by the judge (spo: 0.3 for SD1.5, 0.4 for SDXL)."""
    divert_step: int = 4
    """spo: the step from which on there are pools, from 0."""
    noise_level: float = 0.7
    """Flow matching: how much noise a step adds, a of sigma = a sqrt(s / (1 - s)) (Flow-GRPO: 0.7)."""
    inner_steps: int = 1
    """spo: steps that candidates take on their own before they are compared (SD1.5: 1, SDXL: 3)."""
    advantage_clip: float = 5.0
    """ddpo: largest advantage."""
    prompt_buffer: int = 32
    """ddpo: last rewards of a prompt that its next one is compared with; 0 compares within the round."""
    prompt_min_count: int = 16
    """ddpo: rewards of a prompt from which on they are used; before, those of the round are."""
    passes: int = 1
    """Passes over a round's transitions."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    weight_decay: float = 1e-4
    """Of the optimizer."""
    optimizer: OptimizerName = "adamw"
    """'adamw' (all), 'adafactor' or 'adamw8bit' (bitsandbytes)."""
    dpo_beta: float = 5000.0
    """Of the held-out curve, and of the judge 'self' where it is not calibrated (paper: 5000)."""


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """Who judges what is sampled."""

    name: str
    """'self': the implicit reward of a policy, in latent space. 'spm': a step-aware preference model. Else a
    metric's name, which sees the decoded estimate."""
    options: dict[str, str] = field(default_factory=dict)
    """Options of the metric or of 'spm', as weights: name, value, name, value, ..."""
    policy: str = "base"
    """self: the policy folder whose implicit reward judges; 'base' has none."""
    num_draws: int = 4
    """self: draws of (timestep, noise), shared by all that are compared."""
    record: Path | None = None
    """self: how much each timestep counts, as calibrate_judge found it; None counts all alike."""
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] | None = None
    """self: precision of the networks that judge; None is the trained model's."""
    rewards_by: RewardsBy = "difference"
    """self: 'difference' of two errors, or 'secant' or 'derivative', for which half precision suffices."""
    draw_law: DrawLaw = "uniform"
    """self: how timesteps are drawn; the law that the record was fitted with."""
    embedded_guidance: float = 1.0
    """self: the guidance that a guidance-distilled model is told where it judges."""
    scale: float = 1.0
    """What a metric's score is multiplied by: min_preference_gap takes scores for log-odds."""


def check_settings(settings: OnlineSettings, judge: JudgeSettings) -> None:
    """UserError for settings that go with no method or not together; names flag, value and what to do."""
    if settings.method in ("spo", "d3po") and settings.candidates_per_prompt < 2:
        raise UserError(
            f"candidates_per_prompt is {settings.candidates_per_prompt}, but {settings.method} compares "
            "candidates: set it to 2 or more (published: spo 4 for SD1.5 and 2 for SDXL, d3po 2)"
        )
    if settings.method == "spo" and not 0 <= settings.divert_step < settings.num_inference_steps:
        raise UserError(
            f"divert_step is {settings.divert_step}, but the steps are 0 to "
            f"{settings.num_inference_steps - 1}: pools would never begin. Lower it"
        )
    if settings.method == "ddpo" and settings.batch_transitions % settings.num_inference_steps:
        raise UserError(
            f"batch_transitions is {settings.batch_transitions}, no multiple of num_inference_steps = "
            f"{settings.num_inference_steps}: ddpo trains on whole images. Take images x steps"
        )
    if judge.name == SELF and judge.policy == "base":
        raise UserError(
            "the judge 'self' judges by the policy 'base', whose implicit reward is 0 for every image: name a "
            "policy that has learnt from people, as results/<run>/iter00/policy"
        )
    for name, value in (
        ("rounds", settings.rounds),
        ("prompts_per_update", settings.prompts_per_update),
        ("candidates_per_prompt", settings.candidates_per_prompt),
        ("num_inference_steps", settings.num_inference_steps),
        ("batch_transitions", settings.batch_transitions),
        ("inner_steps", settings.inner_steps),
        ("passes", settings.passes),
        ("num_draws", judge.num_draws),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if settings.noise_level <= 0:
        raise UserError(
            f"noise_level is {settings.noise_level}; it must be above 0: steps without noise have no probability"
        )
    if not 0 < settings.ratio_clip < 1:
        raise UserError(f"ratio_clip is {settings.ratio_clip}; it must be between 0 and 1")
