"""How often a run calls the denoiser until each of its policies is made: what a recipe costs, on any machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stages.core.method.guidance import guided_steps
from stages.core.plan.run import RunPlan

SIDES, MODELS = 2, 2
"""Winner and loser; the policy and what it is compared with."""


def denoiser_calls(config: Mapping[str, Any]) -> dict[str, int]:
    """Rows through a denoiser up to and with the training of each policy, by its name, from a checked config.

    The trainings, the candidates, their rewards, and where weights are fitted the held-out rewards that they are
    fitted to; not the evaluation, nor what is scored on the way. Adaptive draws and early ends are counted as if
    they saved nothing. Empty where preferences.num_pairs is null, and for losses with other counts (mapo, kto).
    """
    plan, pairs = RunPlan(config=config), config["preferences"]["num_pairs"]
    losses = {config[block].get("loss", "sigmoid") for block in ("train_seed", "update_policy")}
    if pairs is None or not losses <= {"sigmoid", "ipo"}:
        return {}
    calls = {"base": 0}
    total = SIDES * MODELS * math.ceil(config["train_seed"]["passes"] * pairs) * (0 in plan.trained)
    calls["iter00"] = total
    sizes = zip(plan.iterations, plan.prompts_wanted, plan.mixed_pairs(pairs), strict=True)
    for iteration, prompts, mixed in sizes:
        total += prompts * calls_of_a_prompt(config) + calls_of_fitted_weights(config)
        total += SIDES * MODELS * math.ceil(config["update_policy"]["passes"] * mixed)
        calls[f"iter{iteration:02d}"] = total
    return calls


def calls_of_a_prompt(config: Mapping[str, Any]) -> int:
    """To sample and to score the candidates of one prompt."""
    plan = RunPlan(config=config)
    sampling, scoring = plan.candidate_sampling, config["score_candidates"]
    steps = sampling["num_inference_steps"]
    is_twice = sampling["guidance_scale"] != 1 and not plan.is_told_guidance
    guided = len(guided_steps(steps, sampling["guidance_interval"])) * is_twice
    rewards = MODELS * scoring["num_draws"]  # scored also where a metric ranks
    return int(config["sample_candidates"]["candidates_per_prompt"] * (steps + guided + rewards))


def calls_of_fitted_weights(config: Mapping[str, Any]) -> int:
    """To score the held-out pairs that a judge's weights, or where its draws go, are fitted to."""
    scoring = config["score_candidates"]
    if scoring["weights"] != "calibrated" and scoring["allocation"] != "importance":
        return 0
    draws = config["preferences"]["num_holdout"] * config["evaluation"]["holdout_draws"]
    return int(SIDES * MODELS * draws)
