"""All that a report is made of, made up: small tables of as many prompts and policies as one likes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stages.core.artifacts.schemas import (
    BREAKDOWN,
    HOLDOUT_REWARDS,
    IMAGE,
    IMAGES,
    LEAKAGE,
    METRIC_SCORES,
    PREFERENCES,
    RELIABILITY,
    SUMMARY,
    TRAINING,
    Schema,
)
from stages.core.artifacts.tables import write_table
from stages.core.evaluation.guards import GUARDS_TABLE, Limits
from stages.write_report import Args
from tests.builders import encoded, image_value

Row = dict[str, Any]

SET, METRIC = "mine", "pickscore"


def put(path: Path, rows: Sequence[Row] | pa.Table, schema: Schema, **arguments: Any) -> Path:
    """The table, written."""
    write_table(path, rows, schema, stage="write_report", arguments=arguments)
    return path


def colour(seed: int, side: int = 16) -> bytes:
    """A small picture of two colours, another one for each seed."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:] = (seed * 37 % 256, seed * 101 % 256, seed * 59 % 256)
    pixels[side // 4 : side // 2, side // 4 : side // 2] = 255 - pixels[0, 0]
    return encoded(pixels, "PNG")


def pair_row(place: int, kind: str, image: bytes, iteration: int = 0) -> Row:
    """A pair of the table of preferences; the margin of pair 3 is the noisiest."""
    row: Row = dict.fromkeys(PREFERENCES.arrow.names)
    row |= {
        "pair_id": f"{kind}-{iteration}-{place}", "prompt_id": f"p{place}",
        "prompt": f"the {kind} prompt {place} of iteration {iteration}",
        "winner": image_value(image), "loser": image_value(image), "iteration": iteration,
        "source": "human" if kind == "human" else "generated",
    }  # fmt: skip
    if kind == "human":
        return row | {"source_file": "labels.csv", "source_row": place}
    margin = 1e-4 * (place + 1)
    return row | {
        "winner_score": margin, "loser_score": 0.0, "margin": margin, "probability": 0.9,
        "margin_standard_error": 1.0 if place == 3 else 1e-5,
    }  # fmt: skip


def judged_row(pair_id: str, gain: float) -> Row:
    """What a judge makes of a held-out pair."""
    row: Row = {name: [0.0] for name in HOLDOUT_REWARDS.arrow.names}
    return row | {
        "pair_id": pair_id, "prompt_id": pair_id, "winner_reward": gain, "loser_reward": 0.0,
        "probability": 0.5 + 1000 * gain, "drift": 0.0, "timesteps": [1], "num_timesteps": 1000,
    }  # fmt: skip


def compared(policy: str, place: int, other: str, other_place: int) -> Row:
    """A row of the summary: each policy gains 0.5."""
    gain = 0.5 * (place - other_place)
    row: Row = dict.fromkeys(SUMMARY.arrow.names, 0.01)
    return row | {
        "prompt_set": SET, "metric": METRIC, "policy": policy, "baseline": other,
        "num_prompts": 100, "mean": 20.0 + 0.5 * place, "baseline_mean": 20.0 + 0.5 * other_place,
        "difference": gain, "ci_low": gain - 0.1, "ci_high": gain + 0.1, "win_rate": 0.6,
        "win_low": 0.5, "win_high": 0.7, "num_wins": 60, "num_ties": 0, "num_losses": 40,
        "better_of_two": 0.5,
    }  # fmt: skip


def guards_row(iteration: int) -> Row:
    """A row of the guards without any warning."""
    row: Row = dict.fromkeys(GUARDS_TABLE.arrow.names)
    row |= {
        "iteration": iteration, "policy": f"iter{iteration:02d}", "reward_accuracy": 0.7,
        "reward_accuracy_low": 0.62, "reward_accuracy_high": 0.78, "num_holdout_pairs": 200,
        "diversity": 0.2, "feature_diversity": 0.2, "features": "perceptual", "drift": 1e-5,
        "blank_share": 0.0, "truncated_share": 0.0, "moved_pixels": 0.1, "moved_features": 0.1,
        "held_out_logit": 1.0,
    }  # fmt: skip
    if iteration:
        row |= {
            "accuracy_change": -0.02, "accuracy_change_low": -0.06, "accuracy_change_high": 0.02,
            "accuracy_change_p": 0.4, "confident_share": 0.3, "rank_correlation": 0.4,
            "best_beats_worst": 0.7,
        }  # fmt: skip
    return row


def evaluation_images(num_prompts: int, images: Sequence[bytes]) -> pa.Table:
    """Two images of each prompt."""
    rows = 2 * num_prompts
    places = np.arange(rows) // 2
    values = [{"bytes": images[row % len(images)], "path": None} for row in range(rows)]
    return pa.table(
        {
            "prompt_id": [f"e{place}" for place in places],
            "prompt": [f"evaluation prompt {place}" for place in places],
            "candidate": pa.array(np.arange(rows) % 2, pa.int32()),
            "seed": np.arange(rows),
            "image": pa.array(values, IMAGE),
        }
    )


def evaluation_scores(num_prompts: int, gain: float) -> pa.Table:
    """Scores of these; prompt 1 loses most, the last one gains most."""
    rows = 2 * num_prompts
    places = np.arange(rows) // 2
    scores = 20.0 + gain * (places - 2) / num_prompts
    return pa.table(
        {
            "prompt_id": [f"e{place}" for place in places],
            "candidate": pa.array(np.arange(rows) % 2, pa.int32()),
            "metric": [METRIC] * rows,
            "score": pa.array(scores, pa.float32()),
        }
    )


def report_inputs(
    folder: Path,
    *,
    num_prompts: int = 20,
    num_iterations: int = 2,
    num_pairs: int = 12,
    images: Sequence[bytes] = (),
) -> Args:
    """The arguments of a report and the files that they name."""
    policies = ("base", *(f"iter{place:02d}" for place in range(num_iterations + 1)))
    pictures = list(images) or [colour(seed) for seed in range(8)]
    files = {
        "import.json": {"rows_read": 30, "num_files": 1, "pairs_kept": 12, "pairs_held_out": 8},
        "config.json": {"iterations": num_iterations, "model": {"base": "my/model"}},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    shown, scores = [], []
    for place, policy in enumerate(policies):
        table = evaluation_images(num_prompts, pictures[place % len(pictures) :])
        shown.append((policy, put(folder / f"{policy}-images.parquet", table, IMAGES)))
        table = evaluation_scores(num_prompts, float(place))
        scores.append((policy, put(folder / f"{policy}-scores.parquet", table, METRIC_SCORES)))
    human = [pair_row(place, "human", pictures[place % len(pictures)]) for place in range(12)]
    judged = [(p, 1e-4 * (3 - place)) for place, p in enumerate(row["pair_id"] for row in human)]
    summary = [
        compared(policy, place, other, before)
        for place, policy in enumerate(policies)
        for before, other in enumerate(policies[: max(1, place)])
    ]
    reliability = [
        {
            "iteration": place, "policy": f"iter{place:02d}", "num_pairs": 8,
            "mean_probability": 0.8, "share_right": 0.7, "share_low": 0.4, "share_high": 0.9,
        }
        for place in range(num_iterations + 1)
    ]  # fmt: skip
    leakage = [
        {
            "prompt_set": SET, "source": "seed", "num_prompts": num_prompts, "num_shared": 0,
            "examples": [],
        }
    ]  # fmt: skip
    steps: list[Row] = [
        {**dict.fromkeys(TRAINING.arrow.names, 0.5), "step": step + 1} for step in range(8)
    ]
    return Args(
        run="made-up",
        config=folder / "config.json",
        summary=put(folder / "summary.parquet", summary, SUMMARY),
        breakdown=put(folder / "breakdown.parquet", [], BREAKDOWN),
        guards=put(
            folder / "guards.parquet",
            [guards_row(place) for place in range(num_iterations + 1)],
            GUARDS_TABLE,
        ),
        reliability=put(folder / "reliability.parquet", reliability, RELIABILITY),
        leakage=put(folder / "leakage.parquet", leakage, LEAKAGE),
        primary_metric=METRIC,
        primary_set=SET,
        limits=Limits(),
        images=tuple(shown),
        scores=tuple(scores),
        policies=policies,
        pairs=tuple(
            put(
                folder / f"pairs{i}.parquet",
                [
                    pair_row(place, "own", pictures[place % len(pictures)], i)
                    for place in range(num_pairs)
                ],
                PREFERENCES,
                candidates_per_prompt=8,
            )
            for i in range(1, num_iterations + 1)
        ),
        training=tuple(
            (place, put(folder / f"training{place}.parquet", steps, TRAINING))
            for place in range(num_iterations + 1)
        ),
        preferences=put(folder / "preferences.parquet", human, PREFERENCES),
        holdout=put(folder / "holdout.parquet", human, PREFERENCES),
        judged=tuple(
            (
                policy,
                put(
                    folder / f"{policy}-judged.parquet",
                    [judged_row(name, gain) for name, gain in judged],
                    HOLDOUT_REWARDS,
                ),
            )
            for policy in policies[1:]
        ),
        import_summary=folder / "import.json",
        output=folder / "report.html",
    )
