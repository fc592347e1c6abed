"""calibrate_judge, and select_pairs by what it found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import calibrate_judge, score_holdout, select_pairs
from stages.core.artifacts.judges import judge_of, read_judge
from stages.core.artifacts.provenance import policy_name
from stages.core.artifacts.schemas import HOLDOUT_REWARDS
from stages.core.artifacts.tables import write_table
from stages.core.errors import UserError
from tests import flow_models
from tests.builders import read_rows, settings

Row = dict[str, Any]
DRAWS = np.arange(50, 1000, 100)


def holdout(path: Path, num_pairs: int, seed: int = 0) -> Path:
    """Pairs of which draws 7 to 9 know the winner, and draws 0 to 2 are loud and know nothing."""
    rng = np.random.default_rng(seed)
    gains = rng.normal(size=(num_pairs, 10)) * np.r_[np.full(3, 1e-2), np.full(7, 1e-3)]
    gains[:, 7:] += 1e-3
    errors = np.full((num_pairs, 10), 0.5)
    rows = [
        {
            "pair_id": f"pair {number}",
            "prompt_id": f"prompt {number // 2}",
            "winner_reward": gains[number].mean(),
            "loser_reward": 0.0,
            "probability": 0.6,
            "drift": 0.1,
            "winner_policy_errors": errors[number] - gains[number],
            "winner_reference_errors": errors[number],
            "loser_policy_errors": errors[number],
            "loser_reference_errors": errors[number],
            "timesteps": DRAWS,
            "num_timesteps": 1000,
        }
        for number in range(num_pairs)
    ]
    write_table(path, rows, HOLDOUT_REWARDS, stage="score_holdout", arguments={}, inputs=[])
    return path


@pytest.fixture
def args(tmp_path: Path, tiny_base: str) -> calibrate_judge.Args:
    return calibrate_judge.Args(
        holdout=holdout(tmp_path / "holdout.parquet", 200), model=settings(tiny_base),
        policy="base", weights="calibrated", seed=0, judged=tmp_path / "judged.parquet",
        output=tmp_path / "judge.json",
    )  # fmt: skip


def accuracy(rows: list[Row]) -> float:
    return float(np.mean([row["winner_reward"] > row["loser_reward"] for row in rows]))


def test_draws_that_know_are_heard_and_the_pairs_are_judged_better(
    args: calibrate_judge.Args,
) -> None:
    calibrate_judge.main(args)
    record = read_judge(args.output)
    assert (record.kind, record.policy, record.num_pairs) == ("calibrated", "base", 200)
    assert min(record.weights[7:]) > 5 * max(record.weights[:3])
    assert np.mean(record.weights) == pytest.approx(1)
    rows, before = read_rows(args.judged), read_rows(args.holdout)
    assert accuracy(rows) > accuracy(before) + 0.1
    assert record.accuracy == pytest.approx(accuracy(rows))
    assert record.plain_accuracy == pytest.approx(accuracy(before))
    assert record.accuracy_gain_low is not None
    assert record.accuracy_gain_low > 0
    assert record.log_loss is not None
    assert record.plain_log_loss is not None
    assert record.log_loss < record.plain_log_loss < 0.7
    losses = [-np.log(row["probability"]) for row in rows]
    assert record.log_loss == pytest.approx(np.mean(losses), rel=1e-4)
    kept = ("pair_id", "prompt_id", "drift", "winner_policy_errors", "timesteps")
    assert [[row[name] for name in kept] for row in rows] == [
        [row[name] for name in kept] for row in before
    ]


@pytest.mark.slow
def test_a_pairs_own_prompt_has_no_part_in_how_it_is_judged(args: calibrate_judge.Args) -> None:
    """Whatever a pair's label says, it is judged by the weights of the others."""
    calibrate_judge.main(args)
    before = read_rows(args.judged)
    rows = read_rows(args.holdout)
    for row in rows[:2]:  # all of the first prompt: winner and loser change places
        for whose in ("policy", "reference"):
            names = [f"{side}_{whose}_errors" for side in ("winner", "loser")]
            row[names[0]], row[names[1]] = row[names[1]], row[names[0]]
    write_table(args.holdout, rows, HOLDOUT_REWARDS, stage="x", arguments={}, inputs=[])
    calibrate_judge.main(args)
    after = read_rows(args.judged)
    for one, other in zip(before[:2], after[:2], strict=True):
        assert other["winner_reward"] - other["loser_reward"] == pytest.approx(
            one["loser_reward"] - one["winner_reward"], rel=1e-5
        )


def test_too_few_pairs_leave_the_weights_equal_and_say_so(
    args: calibrate_judge.Args, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = replace(args, holdout=holdout(tmp_path / "few.parquet", 48))
    calibrate_judge.main(args)
    record = read_judge(args.output)
    assert record.weights == (1.0,) * 10
    assert record.log_odds is None
    assert "48 pairs of 24 prompts, and weights want at least 50 of 10" in caplog.text
    rows, before = read_rows(args.judged), read_rows(args.holdout)
    assert [row["winner_reward"] for row in rows] == pytest.approx(
        [row["winner_reward"] for row in before], rel=1e-3
    )


@pytest.mark.parametrize("num_prompts", [1, 3, 9])
def test_too_few_prompts_leave_the_weights_equal(
    args: calibrate_judge.Args, num_prompts: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        row | {"prompt_id": f"prompt {number % num_prompts}"}
        for number, row in enumerate(read_rows(args.holdout))
    ]
    write_table(args.holdout, rows, HOLDOUT_REWARDS, stage="x", arguments={}, inputs=[])
    calibrate_judge.main(args)
    assert read_judge(args.output).weights == (1.0,) * 10
    assert f"200 pairs of {num_prompts} prompts" in caplog.text


@pytest.mark.slow
def test_ten_prompts_are_enough_to_fit(args: calibrate_judge.Args) -> None:
    rows = [
        row | {"prompt_id": f"prompt {number % 10}"}
        for number, row in enumerate(read_rows(args.holdout))
    ]
    write_table(args.holdout, rows, HOLDOUT_REWARDS, stage="x", arguments={}, inputs=[])
    calibrate_judge.main(args)
    assert read_judge(args.output).log_odds is not None


def test_weights_by_the_signal_to_noise_ratio_rise_with_the_timestep(
    args: calibrate_judge.Args,
) -> None:
    calibrate_judge.main(replace(args, weights="inverse_snr", snr_power=0.5))
    record = read_judge(args.output)
    assert list(record.weights) == sorted(record.weights)
    assert record.weights[9] > 10 * record.weights[0]
    assert record.log_odds is not None


def test_a_flow_models_velocities_count_as_errors_of_clean_latents(
    args: calibrate_judge.Args, tmp_path: Path
) -> None:
    """By s squared in the middle of each bin; SD3's schedule has s = 3 u / (1 + 2 u)."""
    base = settings(flow_models.sd3(tmp_path / "sd3"))
    calibrate_judge.main(replace(args, model=base, weights="inverse_snr", snr_power=1.0))
    u = (np.arange(10) + 0.5) / 10 + 0.001
    expected = (3 * u / (1 + 2 * u)) ** 2
    found = np.array(read_judge(args.output).weights)
    np.testing.assert_allclose(found / found[9], expected / expected[9], rtol=0.01)


def broken(args: calibrate_judge.Args, change: dict[str, Any]) -> calibrate_judge.Args:
    rows = read_rows(args.holdout)
    rows[3] |= change
    write_table(args.holdout, rows, HOLDOUT_REWARDS, stage="x", arguments={}, inputs=[])
    return args


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winner_policy_errors": [0.5] * 9}, "errors of 9, 10 draws, expected one number"),
        ({"loser_policy_errors": [float("nan")] * 10}, "row 3: loser_policy_errors are not finite"),
    ],
)
def test_damaged_errors_are_refused(
    args: calibrate_judge.Args, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        calibrate_judge.main(broken(args, change))
    assert not args.output.exists()


def test_a_table_without_pairs_is_refused(args: calibrate_judge.Args) -> None:
    write_table(args.holdout, [], HOLDOUT_REWARDS, stage="x", arguments={}, inputs=[])
    with pytest.raises(UserError, match=r"no pairs.*num_holdout"):
        calibrate_judge.main(args)


def test_real_held_out_pairs_have_all_it_needs(
    judged: list[score_holdout.Args], args: calibrate_judge.Args
) -> None:
    calibrate_judge.main(replace(args, holdout=judged[0].output, policy=judged[0].policy))
    assert read_judge(args.output).policy == policy_name(judged[0].policy)
    for row, before in zip(read_rows(args.judged), read_rows(judged[0].output), strict=True):
        assert row["winner_reward"] == pytest.approx(before["winner_reward"], rel=1e-4)


def record_of(path: Path, policy: str, weights: list[float], log_odds: float | None) -> Path:
    facts = {"policy": policy_name(policy), "kind": "calibrated", "weights": weights}
    facts |= {"log_odds": log_odds, "num_timesteps": 1000, "num_pairs": 99, "accuracy": 0.6}
    facts |= {"accuracy_low": 0.5, "accuracy_high": 0.7, "spread_power": 0.0, "step": 0.0}
    names = (
        "plain_accuracy",
        "accuracy_gain_low",
        "accuracy_gain_high",
        "log_loss",
        "plain_log_loss",
    )
    path.write_text(json.dumps(facts | dict.fromkeys(names)))
    return path


def test_pairs_are_chosen_by_the_judges_weights_and_their_p_is_its(
    selected: select_pairs.Args, tmp_path: Path
) -> None:
    weights = [float(number) for number in range(10)]
    args = replace(
        selected, judges=(record_of(tmp_path / "j.json", selected.policy, weights, 70.0),),
        judged=tmp_path / "judged.parquet", output=tmp_path / "pairs.parquet",
    )  # fmt: skip
    scored = [row for path in args.rewards for row in read_rows(path)]
    by_prompt: dict[str, list[Row]] = {}
    for row in scored:
        gains = np.subtract(row["reference_errors"], row["policy_errors"])
        value = float(np.average(gains, weights=[time // 100 for time in row["timesteps"]]))
        by_prompt.setdefault(row["prompt_id"], []).append(row | {"weighted": value})
    select_pairs.main(args)
    judged = {(row["prompt_id"], row["candidate"]): row["reward"] for row in read_rows(args.judged)}
    assert len(judged) == len(scored)
    for pair in read_rows(args.output):
        rows = by_prompt[pair["prompt_id"]]
        best, worst = (pick(rows, key=lambda row: row["weighted"]) for pick in (max, min))
        assert (pair["winner_candidate"], pair["loser_candidate"]) == (
            best["candidate"],
            worst["candidate"],
        )
        margin = best["weighted"] - worst["weighted"]
        assert pair["margin"] == pytest.approx(margin, rel=1e-4)
        assert pair["probability"] == pytest.approx(1 / (1 + np.exp(-70 * margin)), rel=1e-4)
        assert judged[pair["prompt_id"], best["candidate"]] == pytest.approx(
            best["weighted"], rel=1e-4
        )


def test_the_record_of_another_policy_is_refused(
    selected: select_pairs.Args, tmp_path: Path
) -> None:
    other = record_of(tmp_path / "j.json", "base", [1.0] * 10, None)
    with pytest.raises(UserError, match="none is of the policy that judges"):
        select_pairs.main(replace(selected, judges=(other,), output=tmp_path / "pairs.parquet"))
    own = record_of(tmp_path / "own.json", selected.policy, [1.0] * 10, None)
    assert judge_of((other, own), policy_name(selected.policy)) == read_judge(own)


@pytest.mark.parametrize("text", ["", "{}", '{"weights": [-1]}'])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "judge.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"judge.json is no record of a judge .*delete it"):
        read_judge(path)
