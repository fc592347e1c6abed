"""A run's tables as the stages write them, small and by hand, for the audit to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stages.core.artifacts.schemas import (
    CANDIDATES,
    HOLDOUT_REWARDS,
    JUDGED,
    METRIC_SCORES,
    PAIR_LATENTS,
    PREFERENCES,
    REWARDS,
    TRAINING_PAIRS,
)
from stages.core.artifacts.tables import write_table
from stages.core.data.prompts import prompt_id
from tests.builders import CAPTIONS, Row, encoded, image_value, picture

POLICY = "0123456789abcdef"
CANDIDATES_EACH = 3
GEOMETRY = [64, 64, 0, 0, 64, 64]


def image(number: int, iteration: int = 0) -> Row:
    """A picture that no other number or iteration has."""
    caption = CAPTIONS[number % len(CAPTIONS)]
    strength = 0.2 + 0.01 * (number // len(CAPTIONS)) + 0.05 * iteration
    return image_value(encoded(picture(caption, strength=strength), "PNG"))


def write_run(
    run: Path, prompts: Sequence[str] = CAPTIONS[:6], *, iterations: int = 1, policy: str = POLICY
) -> Path:
    """Iterations with candidates, rewards, a metric and pairs; human pairs; held-out pairs, half of them
    judged wrongly. Prompt number i has a margin of (i + 1) e-6 and, save for the last, a standard error
    of 1e-6.
    """
    for iteration in range(1, iterations + 1):
        write_iteration(run, prompts, iteration, policy)
    human = [human_row(number, prompt) for number, prompt in enumerate(prompts)]
    made = {"stage": "import_preferences", "arguments": {}}
    write_table(run / "seed/preferences.parquet", human, PREFERENCES, **made)  # type: ignore[arg-type]
    latents = [{"pair_id": row["pair_id"], **sides(number)} for number, row in enumerate(human)]
    path = run / "seed/preferences_latents.parquet"
    write_table(path, latents, PAIR_LATENTS, stage="encode_preferences", arguments={})
    held_out = [human_row(100 + number, prompt) for number, prompt in enumerate(prompts)]
    write_table(run / "seed/holdout.parquet", held_out, PREFERENCES, **made)  # type: ignore[arg-type]
    judged = [judged_row(number, row) for number, row in enumerate(held_out)]
    path = run / "evaluation/holdout/iter00.parquet"
    write_table(path, judged, HOLDOUT_REWARDS, stage="score_holdout", arguments={})
    return run


def write_iteration(
    run: Path, prompts: Sequence[str], iteration: int, policy: str = POLICY
) -> None:
    """One iteration's tables."""
    folder = run / f"iter{iteration:02d}"
    images, rewards, scores, pairs = [], [], [], []
    for number, prompt in enumerate(prompts):
        for candidate in range(CANDIDATES_EACH):
            name = {"prompt_id": prompt_id(prompt), "candidate": candidate}
            place = number * CANDIDATES_EACH + candidate
            images.append({**name, "prompt": prompt, "seed": 1000 * iteration + place,
                           "image": image(place, iteration), "latents": [float(place)] * 4})  # fmt: skip
            reward = 1e-6 * (number + 1) * candidate / (CANDIDATES_EACH - 1)
            rewards.append({**name, "reward": reward, "standard_error": 1e-6,
                            "policy_errors": [0.1, 0.2], "reference_errors": [0.1 + reward, 0.2 + reward],
                            "timesteps": [100, 900], "draw_seed": 7})  # fmt: skip
            scores.append({**name, "metric": "total", "score": float((number * 5) % 6 * candidate)})
        pairs.append(pair_row(images[-1], images[-CANDIDATES_EACH], number, iteration, policy,
                              error=None if number == len(prompts) - 1 else 1e-6))  # fmt: skip
    half = len(prompts) // 2 * CANDIDATES_EACH
    for shard, part in enumerate((slice(None, half), slice(half, None))):
        shard_file = f"shard-{shard}.parquet"
        write_table(folder / "candidates" / shard_file, images[part], CANDIDATES,
                    stage="sample_candidates", arguments={})  # fmt: skip
        write_table(folder / "scores" / shard_file, rewards[part], REWARDS,
                    stage="score_candidates", arguments={})  # fmt: skip
    judged = [{name: row[name] for name in JUDGED.arrow.names} for row in rewards]
    write_table(folder / "judged.parquet", judged, JUDGED, stage="select_pairs", arguments={})
    path = folder / "candidate_scores/total.parquet"
    write_table(path, scores, METRIC_SCORES, stage="score_metric", arguments={})
    write_table(folder / "pairs.parquet", pairs, TRAINING_PAIRS, stage="select_pairs", arguments={})


def pair_row(
    winner: Row, loser: Row, number: int, iteration: int, policy: str, error: float | None
) -> Row:
    """A generated pair."""
    return {
        "pair_id": f"iter{iteration:02d}-{winner['prompt_id']}",
        "prompt_id": winner["prompt_id"],
        "prompt": winner["prompt"],
        "source": "generated",
        "iteration": iteration,
        "policy_digest": policy,
        "margin": 1e-6 * (number + 1),
        "margin_standard_error": error,
        "probability": 0.5 + 0.4 / (number + 1),
        **{
            f"{side}_{name}": row[name]
            for side, row in (("winner", winner), ("loser", loser))
            for name in ("candidate", "seed")
        },
        "winner": winner["image"],
        "loser": loser["image"],
        "winner_score": 1.0,
        "loser_score": 0.0,
        **sides(number),
    }


def sides(number: int) -> Row:
    """Latents and geometry of two images."""
    return {
        "winner_latents": [float(number)] * 4, "loser_latents": [-float(number)] * 4,
        "winner_geometry": GEOMETRY, "loser_geometry": GEOMETRY,
    }  # fmt: skip


def human_row(number: int, prompt: str) -> Row:
    """A human pair."""
    return {
        "pair_id": f"human-{number:06d}",
        "prompt_id": prompt_id(prompt),
        "prompt": prompt,
        "winner": image(number, 8),
        "loser": image(number, 9),
        "source": "human",
        "iteration": 0,
        "source_file": "labels/first.parquet",
        "source_row": number,
    }


def judged_row(number: int, pair: Row) -> Row:
    """What a policy says of a held-out pair: it is wrong about those of odd number."""
    reward = (-1e-6 if number % 2 else 1e-6) * (number + 1)
    errors = {
        f"{side}_{whose}_errors": [0.1, 0.2]
        for side in ("winner", "loser")
        for whose in ("policy", "reference")
    }
    return {
        "pair_id": pair["pair_id"], "prompt_id": pair["prompt_id"], "winner_reward": reward,
        "loser_reward": 0.0, "probability": 0.5 + 0.07 * (number + 1) * (-1 if number % 2 else 1),
        "drift": 0.0, "timesteps": [100, 900], "num_timesteps": 1000, **errors,
    }  # fmt: skip
