"""The unit of every column that holds numbers, and what makes a row of each table one of its kind.

The meaning of a column stands in its schema. Units stand apart, because a stage's digest covers the schemas:
a unit that changes shall rerun nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stages.core.artifacts import online_tables, schemas
from stages.core.artifacts.decisions import DECISIONS, NOTES
from stages.core.artifacts.schemas import Schema
from stages.core.evaluation.guards import GUARDS_TABLE
from stages.core.inspection.columns import SEED
from stages.core.inspection.run_table import RUN_COMPARISON

SCHEMAS: Mapping[str, Schema] = {
    schema.name: schema
    for schema in [
        *vars(schemas).values(),
        *vars(online_tables).values(),
        DECISIONS,
        NOTES,
        GUARDS_TABLE,
        RUN_COMPARISON,
    ]
    if isinstance(schema, Schema)
}
"""Every table that stages exchange, by the name in its metadata."""

ERROR = "mean squared noise"
SHARE = "share, 0 to 1"
P_VALUE = "probability, 0 to 1"
NUMBER = "number, from 0"
SCORE = "the metric's own unit"
NATS = "nats"
LOG_ODDS = "log-odds"

UNITS: Mapping[str, str] = {
    **dict.fromkeys(("item", "iteration", "source_row", "loser_source_row", "candidate"), NUMBER),
    **dict.fromkeys(("winner_candidate", "loser_candidate", "next_candidate", "place"), NUMBER),
    "round": "rounds, from 1",
    "inference_step": "sampler steps, from 0",
    "timestep": "diffusion timestep",
    **dict.fromkeys(("scores", "mean_score"), "log-odds, or the judge's own unit"),
    "advantage": "standard deviations",
    "num_transitions": "transitions, or pairs of them",
    "log_ratio": "nats a dimension",
    **dict.fromkeys(("valid_share", "clipped_share", "tie_share"), SHARE),
    "transitions_per_second": "transitions a second",
    "sampling_seconds": "seconds",
    **dict.fromkeys(("seed", "winner_seed", "loser_seed", "draw_seed"), SEED),
    **dict.fromkeys(("winner_score", "loser_score"), "the ranker's own unit; listwise: mean p of being preferred in its list"),
    **dict.fromkeys(("score", "mean", "baseline_mean", "difference", "better_of_two"), SCORE),
    **dict.fromkeys(("ci_low", "ci_high"), SCORE),
    **dict.fromkeys(("reward", "standard_error", "winner_reward", "loser_reward"), ERROR),
    **dict.fromkeys(("margin", "margin_standard_error", "drift"), ERROR),
    **dict.fromkeys(("policy_errors", "reference_errors"), ERROR),
    **dict.fromkeys(("winner_policy_errors", "winner_reference_errors"), ERROR),
    **dict.fromkeys(("loser_policy_errors", "loser_reference_errors"), ERROR),
    **dict.fromkeys(("winner_error", "loser_error"), ERROR),
    **dict.fromkeys(("probability", "sign_p", "wilcoxon_p", "sign_p_holm"), P_VALUE),
    **dict.fromkeys(("wilcoxon_p_holm", "accuracy_change_p"), P_VALUE),
    "mean_probability": "probability, 0.5 to 1",
    **dict.fromkeys(("latents", "winner_latents", "loser_latents"), "scaled latents"),
    **dict.fromkeys(("geometry", "winner_geometry", "loser_geometry"), "pixels"),
    "timesteps": "diffusion timestep",
    "num_timesteps": "diffusion timesteps",
    "step": "optimizer updates",
    **dict.fromkeys(("loss", "log_loss", "pair_log_losses"), NATS),
    **dict.fromkeys(("logit", "held_out_logit"), LOG_ODDS),
    "gradient_norm": "norm",
    "learning_rate": "of the optimizer",
    "pairs_per_second": "pairs a second",
    **dict.fromkeys(("win_rate", "win_low", "win_high", "implicit_accuracy", "accuracy"), SHARE),
    **dict.fromkeys(("share_right", "share_low", "share_high", "blank_share"), SHARE),
    **dict.fromkeys(("reward_accuracy", "reward_accuracy_low", "reward_accuracy_high"), SHARE),
    **dict.fromkeys(("truncated_share", "best_beats_worst", "confident_share"), SHARE),
    **dict.fromkeys(
        ("accuracy_change", "accuracy_change_low", "accuracy_change_high"),
        "difference of shares, -1 to 1",
    ),
    **dict.fromkeys(("num_prompts", "num_shared", "num_wins", "num_ties", "num_losses"), "prompts"),
    **dict.fromkeys(("num_pairs", "num_holdout_pairs"), "pairs"),
    **dict.fromkeys(("num_images", "num_blank"), "images"),
    "ranks": "rank, from 1",
    "view": "CIELAB",
    "effect_size": "standard deviations",
    "value": "the measure's own unit",
    "run_seconds": "seconds",
    "rank_correlation": "correlation, -1 to 1",
    **dict.fromkeys(("pixel_distance", "diversity", "moved_pixels"), "of the range of a pixel, 0 to 1"),
    **dict.fromkeys(
        ("feature_distance", "feature_diversity", "moved_features"), "distance in the features"
    ),
}  # fmt: skip
"""By the column's name, which means the same in every table."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a table's rows are told apart by, and which of them compete."""

    key: tuple[str, ...]
    """Columns whose values no two rows share."""
    group: tuple[str, ...] = ()
    """Columns that the competing rows share: the candidates of one prompt."""
    ranked_by: str | None = None
    """The column by which they compete."""


CANDIDATE = ("prompt_id", "candidate")
COMPARED = ("metric", "policy", "baseline")
LAYOUTS: Mapping[str, Layout] = {
    "prompts": Layout(key=("prompt_id",)),
    "evaluation_prompts": Layout(key=("prompt_id",)),
    "preferences": Layout(key=("pair_id",)),
    "likes": Layout(key=("image_id",)),
    "liked_pairs": Layout(key=("pair_id",)),
    "like_latents": Layout(key=("image_id",)),
    "human_labels": Layout(key=("labeller", "image_a_name", "image_b_name")),
    "judged_images": Layout(key=("image_name",), group=("prompt_id",), ranked_by="reward"),
    "human_rankings": Layout(key=("labeller", "prompt_id", "labelled_at")),
    "pair_latents": Layout(key=("pair_id",)),
    "training_pairs": Layout(key=("pair_id",)),
    "images": Layout(key=CANDIDATE, group=("prompt_id",)),
    "candidates": Layout(key=CANDIDATE, group=("prompt_id",)),
    "rewards": Layout(key=CANDIDATE, group=("prompt_id",), ranked_by="reward"),
    "judged": Layout(key=CANDIDATE, group=("prompt_id",), ranked_by="reward"),
    "metric_scores": Layout(
        key=("metric", *CANDIDATE), group=("metric", "prompt_id"), ranked_by="score"
    ),
    "holdout_rewards": Layout(key=("pair_id",)),
    "decisions": Layout(key=("prompt_id", "winner_digest", "loser_digest")),
    "notes": Layout(key=("prompt_id", "winner_digest", "loser_digest")),
    "training": Layout(key=("step",)),
    "online_training": Layout(key=("step",)),
    "step_judge_training": Layout(key=("step",)),
    "step_judge_curve": Layout(key=("step", "timestep")),
    "transitions": Layout(key=("round", "place", "candidate", "inference_step")),
    "held_out_curve": Layout(key=("step",)),
    "run_comparison": Layout(key=("prompt_set", *COMPARED)),
    "evaluation_summary": Layout(key=("prompt_set", *COMPARED)),
    "evaluation_breakdown": Layout(key=("prompt_set", "axis", "group", *COMPARED)),
    "leakage": Layout(key=("prompt_set", "source")),
    "reliability": Layout(key=("iteration", "mean_probability")),
    "diversity": Layout(key=("prompt_id",)),
    "guards": Layout(key=("iteration",)),
    "lab_results": Layout(key=("experiment", "arm", "seed", "policy", "measure")),
}
"""By the schema's name."""
