"""How much a run will compute and write: counts from its config, times and sizes from one step each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.core.plan.online_costs import OnlineCounts, OnlineRates, count_round, online_seconds
from stages.core.plan.run import RunPlan

Config = Mapping[str, Any]
ENCODING = "encode human pairs"
"""What of a run's hours the shards of preferences.shards share."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How often a run does what costs time or disk."""

    human_pairs: int
    """Seed pairs and held-out pairs, which are encoded once."""
    encoding_shards: int
    """Jobs that encode them side by side."""
    candidates: int
    """Images sampled and scored, over all iterations."""
    generated_pairs: int
    """Pairs kept of them."""
    evaluation_images: int
    """Images of all policies and the base."""
    training_pairs: int
    """Pairs that pass through a training, over all trainings and passes."""
    policies: int
    """Policies that are kept, the seed's included."""
    reward_draws: int
    """Draws of each candidate's reward."""
    fused_exports: int = 0
    """Exports that hold a denoiser of their own in the export's precision."""
    whole_exports: int = 0
    """Exports that hold the other parts of the pipeline too."""
    lora_exports: int = 0
    """Exports that hold a LoRA of their own."""
    exported_pairs: int = 0
    """Pairs that are exported, once for each layout."""
    pairs_of_a_training: int = 0
    """Pairs of the largest training, and those that are scored on the way."""
    candidates_of_an_iteration: int = 0
    """Images of the iteration that samples most."""
    online_rounds: int = 0
    """Rounds of the online training; 0 without one."""
    online_round: OnlineCounts | None = None
    """What each of them does; None without one."""
    step_judge_pairs: int = 0
    """Pairs that pass through the training of a step-aware preference model."""


@dataclass(frozen=True, kw_only=True)
class StepJudgeRates:
    """Of the training of a step-aware preference model."""

    train_pair: float
    """Seconds of one pair through a step."""
    weight_bytes: int
    """The model."""
    trained_bytes: int
    """What its training keeps of its state: weights and the optimizer's moments."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of one unit of each kind of work on one device, and bytes of what it leaves."""

    sample_image: float
    """All inference steps and the decoding of one image."""
    sample_candidate: float
    """The same of a candidate."""
    score_draw: float
    """One draw of one image by both models."""
    train_pair: float
    """One pair through a training step."""
    encode_image: float
    """One image through the VAE's encoder."""
    image_bytes: int
    """One image file of people's pairs or of the evaluation."""
    candidate_bytes: int
    """One candidate's image file."""
    latents_bytes: int
    """One image's latents in a table."""
    policy_bytes: int
    """The weights of one policy."""
    trained_bytes: int
    """What a training keeps of its state: weights and the optimizer's moments."""
    denoiser_bytes: int = 0
    """A whole denoiser in the export's precision."""
    others_bytes: int = 0
    """The pipeline's other parts, likewise."""
    caption_bytes: int = 0
    """A caption's conditioning."""
    load_denoiser: float = 0.0
    """Reading a denoiser from its files."""
    online: OnlineRates | None = None
    """Of an online training; None without one."""
    step_judge: StepJudgeRates | None = None
    """Where the run trains a step-aware preference model."""


def count(config: Config, evaluation_prompts: int, labelled_pairs: int) -> Counts:
    """What the config asks for.

    `evaluation_prompts` are those of all evaluation sets together; `labelled_pairs` are all that the
    files hold (with preferences.unpaired all likes), of which `preferences.num_pairs: null` takes what is not held out.
    """
    plan = RunPlan(config=config)
    prompts = sum(plan.prompts_wanted)
    held_out = config["preferences"]["num_holdout"]
    pairs = config["preferences"]["num_pairs"]
    is_unpaired = config["preferences"].get("unpaired", False)
    if pairs is None:
        pairs = max(0, labelled_pairs - held_out * (2 if is_unpaired else 1))
    if is_unpaired:  # single images, of which two cost what a pair does
        pairs = math.ceil(pairs / 2)
    mixed = plan.mixed_pairs(pairs)
    seed_pairs = config["train_seed"]["passes"] * pairs if 0 in plan.trained else 0
    images = config["evaluation"]["images_per_prompt"]
    policies = len(plan.policies) + plan.is_online
    judge = config.get("step_judge", {})
    return Counts(
        human_pairs=pairs + held_out,
        encoding_shards=config["preferences"].get("shards", 1),
        candidates=prompts * config["sample_candidates"]["candidates_per_prompt"],
        generated_pairs=plan.pairs_per_prompt * prompts,
        evaluation_images=evaluation_prompts * images * policies,
        training_pairs=math.ceil(seed_pairs + config["update_policy"]["passes"] * sum(mixed)),
        policies=policies - 1,
        reward_draws=config["score_candidates"]["num_draws"],
        pairs_of_a_training=max([pairs if 0 in plan.trained else 0, *mixed])
        + min(held_out, config.get("held_out_curve", {}).get("num_pairs", 0)),
        candidates_of_an_iteration=max([0, *plan.prompts_wanted])
        * config["sample_candidates"]["candidates_per_prompt"],
        online_rounds=config["online"]["rounds"] if plan.is_online else 0,
        online_round=a_round_of(plan) if plan.is_online else None,
        step_judge_pairs=judge["num_steps"] * judge["batch_pairs"] if plan.trains_step_judge else 0,
        **count_exports(config, sum(mixed)),
    )


def a_round_of(plan: RunPlan) -> OnlineCounts:
    """What each round of the config's block `online` does."""
    online = plan.config["online"]
    return count_round(
        online,
        judge=online["judge"],
        judge_draws=online["judge_draws"],
        is_told_guidance=plan.is_told_guidance,
    )


def count_exports(config: Config, mixed_pairs: int) -> dict[str, int]:
    """What leaves the run as new files; a full fine-tune's diffusers folder is linked."""
    export = config.get("export", {})
    plan = RunPlan(config=config)
    policies = len(plan.policies) - 1 + plan.is_online
    is_lora = config.get("lora", {}).get("rank", 0) > 0
    layouts = export.get("policies", [])
    single = policies * ("single-file" in layouts)
    return {
        "fused_exports": single + policies * ("diffusers" in layouts and is_lora),
        "whole_exports": single,
        "lora_exports": policies * ("lora-kohya" in layouts and is_lora),
        "exported_pairs": mixed_pairs * len(export.get("preferences", [])),
    }


def hours(counts: Counts, rates: Rates) -> dict[str, float]:
    """Device hours of each kind of work."""
    seconds = {
        ENCODING: 2 * counts.human_pairs * rates.encode_image,
        "sample candidates": counts.candidates * rates.sample_candidate,
        "score candidates": counts.candidates * counts.reward_draws * rates.score_draw,
        "train": counts.training_pairs * rates.train_pair,
        "sample evaluation images": counts.evaluation_images * rates.sample_image,
    }
    if rates.step_judge is not None:
        seconds["train the step judge"] = counts.step_judge_pairs * rates.step_judge.train_pair
    if counts.online_round is not None and rates.online is not None:
        seconds |= online_seconds(
            counts.online_round, counts.online_rounds, rates.online, rates.score_draw
        )
    return {name: value / 3600 for name, value in seconds.items()}


def clock_hours(
    taken: Mapping[str, float], *, devices: int, training_gpus: int, encoding_shards: int
) -> float:
    """Hours on the clock of device hours: shards spread over all devices, a training over its own.

    The stages of an iteration follow each other; evaluation, which could run beside the next one, is
    counted as if it waited. An online training has the devices of a training, for all that it does, and so has
    that of a step judge.
    """
    training = {name for name in taken if name.startswith(("train", "online: "))}
    encoding = taken.get(ENCODING, 0.0)
    spread = (sum(taken[name] for name in taken if name not in training) - encoding) / devices
    spread += encoding / min(devices, encoding_shards)
    return spread + sum(taken[name] for name in training) / min(devices, training_gpus)


def disk_bytes(counts: Counts, rates: Rates) -> dict[str, int]:
    """Bytes that stay under results/, and the largest training state beside them."""
    pair = 2 * (rates.image_bytes + rates.latents_bytes)
    candidate = rates.candidate_bytes + rates.latents_bytes
    judge = rates.step_judge
    return {
        "human pairs": counts.human_pairs * pair,
        "candidates": counts.candidates * candidate,
        "pairs and mixes": math.ceil(counts.generated_pairs * (4 * candidate + 0.33 * pair)),
        "evaluation images": counts.evaluation_images * rates.image_bytes,
        "policies": counts.policies * rates.policy_bytes,
        "exports": counts.fused_exports * rates.denoiser_bytes
        + counts.whole_exports * rates.others_bytes
        + counts.lora_exports * rates.policy_bytes
        + counts.exported_pairs * 2 * max(rates.image_bytes, rates.candidate_bytes),
        **({} if judge is None else {"step judge": judge.weight_bytes}),
        "training state": max(rates.trained_bytes, 0 if judge is None else judge.trained_bytes),
        # For as long as it trains; with a caption for each pair, which is the most there can be.
        "a training's encoded pairs": counts.pairs_of_a_training
        * (2 * rates.latents_bytes + rates.caption_bytes),
    }
