"""Draws where the information is: what score_candidates makes of them, and what select_pairs reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stages import score_candidates, select_pairs
from stages.core.artifacts.judges import JudgeRecord, facts_of, read_judge
from stages.core.artifacts.provenance import policy_name
from stages.core.errors import UserError
from stages.core.method.adaptive import rounds
from stages.core.method.allocation import density_of
from tests.builders import read_rows

WEIGHTS = (0.5, 0.5, 2.0, 1.0)
SPREADS = (1.0, 1.0, 4.0, 1.0)


@pytest.fixture
def judge(scored: list[score_candidates.Args], tmp_path: Path) -> Path:
    """A judge that looks at the third quarter of the timesteps."""
    record = JudgeRecord(
        policy=policy_name(scored[0].policy), kind="calibrated", weights=WEIGHTS, spreads=SPREADS,
        log_odds=2500.0, num_timesteps=1000, num_pairs=60, accuracy=0.7, accuracy_low=0.6,
        accuracy_high=0.8,
    )  # fmt: skip
    path = tmp_path / "judge.json"
    path.write_text(json.dumps(facts_of(record)))
    assert read_judge(path) == record
    return path


def gains_of(row: dict[str, list[float]]) -> np.ndarray:
    return np.subtract(row["reference_errors"], row["policy_errors"])


def test_the_first_draws_and_then_two_at_a_time() -> None:
    assert rounds(10, 4) == [slice(0, 4), slice(4, 6), slice(6, 8), slice(8, 10)]
    assert rounds(7, 4) == [slice(0, 4), slice(4, 6), slice(6, 7)]
    assert rounds(3, 4) == [slice(0, 3)]


def test_adaptive_draws_are_those_of_today_and_fewer_where_a_candidate_is_neither_best_nor_worst(
    scored: list[score_candidates.Args], selected: select_pairs.Args, tmp_path: Path
) -> None:
    paths = []
    for number, shard in enumerate(scored):
        full = replace(shard, num_draws=8, output=tmp_path / f"full-{number}.parquet")
        score_candidates.main(full)
        args = replace(
            full, adaptive_confidence=0.55, first_draws=2, output=tmp_path / f"few-{number}.parquet"
        )
        score_candidates.main(args)
        paths.append((full.output, args.output))
    lengths = []
    for all_path, few_path in paths:
        for whole, few in zip(read_rows(all_path), read_rows(few_path), strict=True):
            known = dict(zip(whole["timesteps"], gains_of(whole), strict=True))
            for step, gain in zip(few["timesteps"], gains_of(few), strict=True):
                assert gain == pytest.approx(known[step], abs=2e-6)
            lengths.append(len(few["timesteps"]))
            assert len(few["policy_errors"]) == lengths[-1]
            if lengths[-1] == 8:
                assert few["reward"] == pytest.approx(whole["reward"], abs=1e-6)
    assert min(lengths) < 8
    assert lengths.count(8) >= 2 * 4  # best and worst of each prompt
    args = replace(
        selected, rewards=tuple(few for _, few in paths), output=tmp_path / "pairs.parquet"
    )
    select_pairs.main(args)
    drawn = {(r["prompt_id"], r["candidate"]): r for _, p in paths for r in read_rows(p)}
    for row in read_rows(args.output):
        for side in ("winner", "loser"):
            assert len(drawn[row["prompt_id"], row[f"{side}_candidate"]]["timesteps"]) == 8


def test_draws_by_importance_fall_where_the_judge_looks_and_count_for_how_often_they_are_made(
    scored: list[score_candidates.Args], selected: select_pairs.Args, judge: Path, tmp_path: Path
) -> None:
    density = density_of(np.array(WEIGHTS), np.array(SPREADS))
    outputs = []
    for number, shard in enumerate(scored):
        args = replace(
            shard, num_draws=12, judges=(judge,), allocation="importance",
            output=tmp_path / f"rewards-{number}.parquet",
        )  # fmt: skip
        score_candidates.main(args)
        outputs.append(args.output)
    rows = [row for path in outputs for row in read_rows(path)]
    steps = np.array([row["timesteps"] for row in rows])
    assert ((steps // 250) == 2).mean() == pytest.approx(density[2] / 4, abs=0.1)
    for row in rows:
        shares = 1 / density[np.array(row["timesteps"]) // 250]
        assert row["reward"] == pytest.approx((gains_of(row) * shares).mean(), abs=1e-8)
    chosen = replace(
        selected, rewards=tuple(outputs), judges=(judge,), allocation="importance",
        judged=tmp_path / "judged.parquet", output=tmp_path / "pairs.parquet",
    )  # fmt: skip
    select_pairs.main(chosen)
    weights = np.array(WEIGHTS)
    expected = {}
    for row in rows:
        bins = np.array(row["timesteps"]) // 250
        parts = gains_of(row) * weights[bins] / density[bins]
        expected[row["prompt_id"], row["candidate"]] = parts
    for row in read_rows(chosen.judged or Path()):
        parts = expected[row["prompt_id"], row["candidate"]]
        assert row["reward"] == pytest.approx(parts.mean(), abs=1e-8)
        assert row["standard_error"] == pytest.approx(parts.std(ddof=1) / 12**0.5, abs=1e-8)
    for row in read_rows(chosen.output):
        sides = [
            expected[row["prompt_id"], row[f"{side}_candidate"]] for side in ("winner", "loser")
        ]
        gap = sides[0] - sides[1]
        assert row["margin"] == pytest.approx(gap.mean(), abs=1e-8)
        assert row["margin_standard_error"] == pytest.approx(gap.std(ddof=1) / 12**0.5, rel=1e-4)


def test_a_judge_weights_candidates_with_fewer_draws_too(
    scored: list[score_candidates.Args], selected: select_pairs.Args, judge: Path, tmp_path: Path
) -> None:
    outputs = []
    for number, shard in enumerate(scored):
        args = replace(
            shard, num_draws=8, judges=(judge,), adaptive_confidence=0.55, first_draws=2,
            output=tmp_path / f"rewards-{number}.parquet",
        )  # fmt: skip
        score_candidates.main(args)
        outputs.append(args.output)
    chosen = replace(
        selected, rewards=tuple(outputs), judges=(judge,),
        judged=tmp_path / "judged.parquet", output=tmp_path / "pairs.parquet",
    )  # fmt: skip
    select_pairs.main(chosen)
    rows = {(r["prompt_id"], r["candidate"]): r for path in outputs for r in read_rows(path)}
    assert {len(row["timesteps"]) for row in rows.values()} - {8}
    for row in read_rows(chosen.judged or Path()):
        whole = rows[row["prompt_id"], row["candidate"]]
        if len(whole["timesteps"]) == 8:
            weights = np.array(WEIGHTS)[np.array(whole["timesteps"]) // 250]
            expected = (gains_of(whole) * weights).sum() / weights.sum()
            assert row["reward"] == pytest.approx(expected, abs=1e-8)


def test_importance_without_a_judge_is_refused(
    scored: list[score_candidates.Args], tmp_path: Path
) -> None:
    args = replace(scored[0], allocation="importance", output=tmp_path / "rewards.parquet")
    with pytest.raises(UserError, match="goes by what each timestep counts: give --judges"):
        score_candidates.main(args)
