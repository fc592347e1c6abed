"""What a config says of the online method that makes no sense together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def online_mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    """What the online method cannot do."""
    online, gpus = config["online"], config["execution"]["training_gpus"]
    method, steps = online["method"], online["num_inference_steps"]
    if method in ("spo", "d3po") and online["candidates_per_prompt"] < 2:
        yield (
            f"'online.candidates_per_prompt' is {online['candidates_per_prompt']}, but {method} compares candidates; "
            "set it to 2 or more"
        )
    if method == "spo" and online["divert_step"] >= steps:
        yield (
            f"'online.divert_step' is {online['divert_step']} and 'online.num_inference_steps' is {steps}: there "
            "would be no pool of candidates; lower the first"
        )
    captions = config["preferences"]["num_pairs"]
    is_own = config["select_pairs"]["strategy"] == "spin"
    if method != "none" and is_own and captions is not None and online["num_prompts"] > captions:
        yield (
            f"'online.num_prompts' is {online['num_prompts']}, but with the strategy 'spin' prompts are the captions of "
            f"the human pairs, of which 'preferences.num_pairs' = {captions}; lower the first"
        )
    if method == "ddpo" and online["batch_transitions"] % steps:
        yield (
            f"'online.batch_transitions' is {online['batch_transitions']}, no multiple of "
            f"'online.num_inference_steps' = {steps}; ddpo trains on whole images"
        )
    if method != "none" and online["prompts_per_update"] % gpus:
        yield (
            f"'online.prompts_per_update' is {online['prompts_per_update']}, no multiple of "
            f"'execution.training_gpus' = {gpus}; a round's prompts are shared equally"
        )
    if method == "ddpo" and online["prompt_min_count"] > online["prompt_buffer"] > 0:
        yield (
            f"'online.prompt_min_count' is {online['prompt_min_count']} and 'online.prompt_buffer' is "
            f"{online['prompt_buffer']}: a prompt would never have so many rewards; lower the first"
        )
    yield from _step_judge_mistakes(config)


def _step_judge_mistakes(config: Mapping[str, Any]) -> Iterator[str]:
    """What the training of a step-aware preference model cannot do."""
    judge, gpus = config["step_judge"], config["execution"]["training_gpus"]
    if judge["clip"] is None:
        return
    if "weights" in config["metrics"].get("spm", {}):
        yield (
            "'step_judge.clip' trains a step-aware preference model and 'metrics.spm.weights' names another; take one "
            "of them out of the config"
        )
    if judge["batch_pairs"] % gpus:
        yield (
            f"'step_judge.batch_pairs' is {judge['batch_pairs']}, no multiple of 'execution.training_gpus' = {gpus}"
        )
    if judge["warmup_steps"] > judge["num_steps"]:
        yield (
            f"'step_judge.warmup_steps' is {judge['warmup_steps']} and 'step_judge.num_steps' is "
            f"{judge['num_steps']}: the learning rate would never be reached; lower the first"
        )
