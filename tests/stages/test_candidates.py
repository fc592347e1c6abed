"""sample_candidates, score_candidates and select_pairs: from prompts to pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from stages import (
    encode_preferences,
    generate_evaluation,
    sample_candidates,
    score_candidates,
    score_metric,
    select_pairs,
    select_prompts,
)
from stages.core.artifacts.images import ImageFiles, image_kind
from stages.core.artifacts.provenance import policy_digest, write_manifest
from stages.core.artifacts.schemas import REWARDS
from stages.core.artifacts.tables import read_metadata, write_table
from stages.core.errors import UserError
from stages.core.method.rewards import preference_probability
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.policies import generation
from tests.builders import pixels_of, read_rows

Row = dict[str, Any]


def keyed(paths: Sequence[Path]) -> dict[tuple[str, int], Row]:
    return {(row["prompt_id"], row["candidate"]): row for path in paths for row in read_rows(path)}


def assert_same_images(
    first: dict[tuple[str, int], Row], second: dict[tuple[str, int], Row]
) -> None:
    assert set(first) == set(second)
    for key, row in first.items():
        other = second[key]
        assert row["seed"] == other["seed"]
        np.testing.assert_allclose(row["latents"], other["latents"], atol=1e-4)
        change = pixels_of(row["image"]).astype(int) - pixels_of(other["image"])
        assert np.abs(change).max() <= 1


def test_shards_share_the_prompts_and_every_image_has_its_own_seed(
    sampled: list[sample_candidates.Args], prompts: select_prompts.Args
) -> None:
    tables = [read_rows(args.output) for args in sampled]
    assert [len(table) for table in tables] == [6, 6]
    rows = tables[0] + tables[1]
    names = {row["prompt_id"] for row in read_rows(prompts.output)}
    assert {(r["prompt_id"], r["candidate"]) for r in rows} == {
        (name, number) for name in names for number in range(3)
    }
    for row in rows:
        parts = (0, "sample_candidates", 1, row["prompt_id"], row["candidate"])
        assert row["seed"] == seed_of(*parts)
        assert pixels_of(row["image"]).shape == (64, 64, 3)
        assert len(row["latents"]) == 8 * 8 * 8


def test_one_shard_and_other_batches_give_the_same_images_as_two_shards(
    sampled: list[sample_candidates.Args], tmp_path: Path
) -> None:
    one = replace(
        sampled[0], shard=0, num_shards=1, prompts_per_batch=3, output=tmp_path / "one.parquet"
    )
    sample_candidates.main(one)
    assert_same_images(keyed([args.output for args in sampled]), keyed([one.output]))


def test_candidates_kept_as_jpeg_have_the_same_latents(
    sampled: list[sample_candidates.Args], tmp_path: Path
) -> None:
    files = ImageFiles(kind="jpeg", quality=95)
    kept = replace(sampled[0], files=files, output=tmp_path / "jpeg.parquet")
    sample_candidates.main(kept)
    exact, ours = keyed([sampled[0].output]), keyed([kept.output])
    assert exact.keys() == ours.keys()
    for key, row in ours.items():
        assert image_kind(row["image"]["bytes"], "candidate") == "jpg"
        assert row["latents"] == exact[key]["latents"]
        change = pixels_of(row["image"]).astype(int) - pixels_of(exact[key]["image"])
        assert 0 < np.abs(change).mean() < 8


def test_another_iteration_gives_other_images(
    sampled: list[sample_candidates.Args], tmp_path: Path
) -> None:
    other = replace(sampled[0], iteration=2, output=tmp_path / "other.parquet")
    sample_candidates.main(other)
    ours, theirs = keyed([sampled[0].output]), keyed([other.output])
    assert all(ours[key]["latents"] != theirs[key]["latents"] for key in ours)


class CtrlC:
    """A function that is interrupted when it is called for the second time."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


@pytest.mark.parametrize(
    ("stage", "fixture", "module", "function"),
    [
        (sample_candidates, "sampled", generation, "sample_latents"),
        (generate_evaluation, "evaluated", generation, "sample_latents"),
        (score_candidates, "scored", score_candidates, "draw_errors"),
    ],
)
def test_an_interrupted_stage_goes_on_after_its_last_finished_batch_with_the_same_bits(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stage: Any,
    fixture: str,
    module: Any,
    function: str,
) -> None:
    found = request.getfixturevalue(fixture)
    args = found["iter01"] if isinstance(found, dict) else found[0]
    args = replace(args, output=tmp_path / "table.parquet")
    if hasattr(args, "prompts_per_batch"):
        args = replace(args, prompts_per_batch=1)
    stage.main(args)
    unbroken = args.output.read_bytes()
    args.output.unlink()

    original = getattr(module, function)
    monkeypatch.setattr(module, function, CtrlC(original))
    with pytest.raises(KeyboardInterrupt):
        stage.main(args)
    assert not args.output.exists()
    counted = CtrlC(original)
    counted.calls = 2
    monkeypatch.setattr(module, function, counted)
    stage.main(args)
    assert args.output.read_bytes() == unbroken
    counted_whole = CtrlC(original)
    counted_whole.calls = 2
    monkeypatch.setattr(module, function, counted_whole)
    stage.main(replace(args, output=tmp_path / "whole.parquet"))
    assert counted.calls == counted_whole.calls - 1
    assert [each.name for each in tmp_path.glob(".*")] == []


def test_a_shard_that_does_not_exist_is_refused(sampled: list[sample_candidates.Args]) -> None:
    with pytest.raises(UserError, match="--shard must be between 0 and 1, found 2"):
        sample_candidates.main(replace(sampled[0], shard=2))


def test_more_shards_than_prompts_give_empty_tables_that_later_stages_read(
    sampled: list[sample_candidates.Args], scored: list[score_candidates.Args], tmp_path: Path
) -> None:
    empty = replace(sampled[0], shard=8, num_shards=9, output=tmp_path / "candidates.parquet")
    sample_candidates.main(empty)
    assert read_rows(empty.output) == []
    rewards = replace(scored[0], candidates=empty.output, output=tmp_path / "rewards.parquet")
    score_candidates.main(rewards)
    assert read_rows(rewards.output) == []


def test_rewards_are_the_mean_gap_of_the_errors_kept_with_them(
    scored: list[score_candidates.Args],
) -> None:
    rows = [row for args in scored for row in read_rows(args.output)]
    assert len(rows) == 12
    for row in rows:
        gain = np.array(row["reference_errors"]) - np.array(row["policy_errors"])
        assert row["reward"] == pytest.approx(gain.mean(), abs=1e-8)
        assert row["standard_error"] == pytest.approx(gain.std(ddof=1) / 2, abs=1e-8)
        assert row["reward"] != 0
        assert row["draw_seed"] == seed_of(0, "score_candidates", 1, row["prompt_id"])
        assert [step // 250 for step in row["timesteps"]] == [0, 1, 2, 3]


def test_candidates_of_a_prompt_share_their_draws_and_prompts_do_not(
    scored: list[score_candidates.Args],
) -> None:
    rows = [row for args in scored for row in read_rows(args.output)]
    draws = {(row["prompt_id"], tuple(row["timesteps"]), row["draw_seed"]) for row in rows}
    assert len(draws) == 4


def test_a_policy_judged_against_itself_has_reward_exactly_0(
    scored: list[score_candidates.Args], tmp_path: Path
) -> None:
    args = replace(scored[0], reference=scored[0].policy, output=tmp_path / "rewards.parquet")
    score_candidates.main(args)
    assert [row["reward"] for row in read_rows(args.output)] == [0.0] * 6


def test_reencoded_images_have_nearly_the_rewards_of_the_samplers_latents(
    scored: list[score_candidates.Args], tmp_path: Path
) -> None:
    args = replace(scored[0], reencode=True, output=tmp_path / "rewards.parquet")
    score_candidates.main(args)
    ours, theirs = keyed([scored[0].output]), keyed([args.output])
    errors = np.array([[rows[key]["policy_errors"] for key in ours] for rows in (ours, theirs)])
    assert not np.array_equal(errors[0], errors[1])
    assert np.corrcoef(errors.reshape(2, -1))[0, 1] > 0.6  # the VAE moves its quiet channels


def test_one_draw_has_no_standard_error(
    scored: list[score_candidates.Args], tmp_path: Path
) -> None:
    args = replace(scored[0], num_draws=1, output=tmp_path / "rewards.parquet")
    score_candidates.main(args)
    assert {row["standard_error"] for row in read_rows(args.output)} == {None}


def test_a_policy_that_has_diverged_is_refused_as_a_judge(
    scored: list[score_candidates.Args], model: DiffusionModel, tmp_path: Path
) -> None:
    broken = model.load_denoiser()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    broken.save(tmp_path / "policy", "unet")
    write_manifest(tmp_path / "policy", stage="train_seed", arguments={}, inputs=[], facts={})
    args = replace(scored[0], policy=str(tmp_path / "policy"), output=tmp_path / "rewards.parquet")
    with pytest.raises(UserError, match="not finite: .nan, nan, nan.*policy or base has diverged"):
        score_candidates.main(args)
    assert not args.output.exists()


def test_pairs_are_the_best_and_the_worst_with_all_that_is_known_of_them(
    selected: select_pairs.Args,
    sampled: list[sample_candidates.Args],
    scored: list[score_candidates.Args],
) -> None:
    candidates = keyed([args.output for args in sampled])
    rewards = keyed([args.output for args in scored])
    rows = read_rows(selected.output)
    names = [row["prompt_id"] for row in rows]
    assert names == sorted({name for name, _ in candidates})
    for row in rows:
        name = row["prompt_id"]
        own = [rewards[name, number]["reward"] for number in range(3)]
        assert row["winner_candidate"] == int(np.argmax(own))
        assert row["loser_candidate"] == int(np.argmin(own))
        assert row["margin"] == pytest.approx(max(own) - min(own), rel=1e-5)
        assert row["probability"] == pytest.approx(
            preference_probability(row["margin"], 5000.0), rel=1e-4
        )
        for side in ("winner", "loser"):
            candidate = candidates[name, row[f"{side}_candidate"]]
            assert row[side] == candidate["image"]
            assert row[f"{side}_latents"] == candidate["latents"]
            assert row[f"{side}_seed"] == candidate["seed"]
        gains = [
            np.array(rewards[name, row[f"{side}_candidate"]]["reference_errors"])
            - np.array(rewards[name, row[f"{side}_candidate"]]["policy_errors"])
            for side in ("winner", "loser")
        ]
        error = (gains[0] - gains[1]).std(ddof=1) / 2
        assert row["margin_standard_error"] == pytest.approx(error, rel=1e-4)
        assert row["pair_id"] == f"iter01-{name}"
        assert (row["source"], row["iteration"]) == ("generated", 1)
        assert row["policy_digest"] == policy_digest(Path(selected.policy))


def test_random_pairs_are_ordered_by_reward_and_not_always_the_extremes(
    selected: select_pairs.Args, tmp_path: Path
) -> None:
    found = set()
    for seed in range(6):
        args = replace(selected, strategy="random", seed=seed, output=tmp_path / "pairs.parquet")
        select_pairs.main(args)
        rows = read_rows(args.output)
        assert len(rows) == 4
        assert all(row["margin"] >= 0 for row in rows)
        found.add(tuple((row["winner_candidate"], row["loser_candidate"]) for row in rows))
    assert len(found) > 1


def test_a_metric_that_ranks_decides_winner_and_loser(
    selected: select_pairs.Args, candidate_scores: score_metric.Args, tmp_path: Path
) -> None:
    args = replace(selected, ranking=(candidate_scores.output,), output=tmp_path / "pairs.parquet")
    select_pairs.main(args)
    scores = keyed([candidate_scores.output])
    for row in read_rows(args.output):
        own = [scores[row["prompt_id"], number]["score"] for number in range(3)]
        assert (row["winner_score"], row["loser_score"]) == (max(own), min(own))


def test_a_ranking_that_lacks_a_prompt_is_refused(
    selected: select_pairs.Args,
    sampled: list[sample_candidates.Args],
    candidate_scores: score_metric.Args,
    tmp_path: Path,
) -> None:
    half = replace(candidate_scores, images=(sampled[0].output,), output=tmp_path / "half.parquet")
    score_metric.main(half)
    args = replace(selected, ranking=(half.output,), output=tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="has 0 scores, expected candidates_per_prompt = 3"):
        select_pairs.main(args)


def test_another_number_of_candidates_is_refused_with_prompt_and_numbers(
    selected: select_pairs.Args, tmp_path: Path
) -> None:
    args = replace(selected, candidates_per_prompt=5, output=tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="prompt [0-9a-f]{16} has 3 rewards, expected .* = 5"):
        select_pairs.main(args)
    assert not args.output.exists()


def test_candidates_that_lack_a_prompt_are_refused(
    selected: select_pairs.Args, tmp_path: Path
) -> None:
    args = replace(selected, candidates=selected.candidates[:1], output=tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="the candidates hold 2 of the 4 prompts"):
        select_pairs.main(args)


def test_pairs_within_their_noise_are_left_out_and_none_left_is_refused(
    selected: select_pairs.Args, tmp_path: Path
) -> None:
    rows = read_rows(selected.output)
    ratios = sorted(row["margin"] / row["margin_standard_error"] for row in rows)
    args = replace(
        selected,
        output=tmp_path / "pairs.parquet",
        min_margin_in_standard_errors=(ratios[1] + ratios[2]) / 2,
    )
    select_pairs.main(args)
    assert len(read_rows(args.output)) == 2
    with pytest.raises(UserError, match="none of 4 pairs has a margin of at least 1000000.0"):
        select_pairs.main(replace(args, min_margin_in_standard_errors=1e6))


def test_pairs_that_the_judge_is_not_sure_of_are_left_out(
    selected: select_pairs.Args, tmp_path: Path
) -> None:
    found = {row["pair_id"]: row["probability"] for row in read_rows(selected.output)}
    low, high = sorted(found.values())[-2:]
    between = (low + high) / 2
    args = replace(selected, min_probability=between, output=tmp_path / "pairs.parquet")
    select_pairs.main(args)
    kept = {row["pair_id"] for row in read_rows(args.output)}
    assert kept == {name for name, p in found.items() if p > between}
    assert 0 < len(kept) < len(found)
    with pytest.raises(
        UserError, match=r"p\(winner > loser\) of at least 0.9 .the surest has 0.500"
    ):
        select_pairs.main(replace(args, min_probability=0.9, dpo_beta=1e-6))


def test_tables_say_which_policy_and_inputs_made_them(
    selected: select_pairs.Args, scored: list[score_candidates.Args]
) -> None:
    manifest = str(Path(selected.policy) / "manifest.json")
    for path in (selected.output, scored[0].output, scored[0].candidates):
        assert manifest in read_metadata(path)["inputs"]


def alike(scored: list[score_candidates.Args], folder: Path, prompts: int) -> tuple[Path, ...]:
    """The rewards, with the candidates of some prompts all alike."""
    found = []
    for number, args in enumerate(scored):
        rows = read_rows(args.output)
        names = sorted({row["prompt_id"] for row in rows})[:prompts]
        for row in rows:
            if row["prompt_id"] in names:
                row |= {"reward": 0.0, "standard_error": 0.0,
                        "policy_errors": row["reference_errors"]}  # fmt: skip
        path = folder / f"{number}.parquet"
        write_table(path, rows, REWARDS, stage="score_candidates", arguments={})
        found.append(path)
    return tuple(found)


@pytest.mark.parametrize("margin", [0.0, 1.0])
@pytest.mark.parametrize("strategy", ["best_worst", "random"])
def test_a_prompt_whose_rewards_are_all_equal_makes_no_pair(
    selected: select_pairs.Args,
    scored: list[score_candidates.Args],
    tmp_path: Path,
    margin: float,
    strategy: Literal["best_worst", "random"],
) -> None:
    args = replace(
        selected, rewards=alike(scored, tmp_path, 1), output=tmp_path / "pairs.parquet",
        strategy=strategy, min_margin_in_standard_errors=margin / 100,
    )  # fmt: skip
    select_pairs.main(args)
    assert len(read_rows(args.output)) == len(read_rows(selected.output)) - len(scored)
    args = replace(args, rewards=alike(scored, tmp_path, 99), output=tmp_path / "none.parquet")
    with pytest.raises(UserError, match="have the same score: the judge has no opinion"):
        select_pairs.main(args)
    assert not args.output.exists()


@pytest.mark.parametrize(
    ("margin", "error", "is_kept"),
    [(0.2, 0.1, True), (0.2, 0.11, False), (0.2, None, False), (0.2, 0.0, True), (0.0, 0.0, False)],
)
def test_a_margin_is_clear_beside_its_standard_error_and_not_without_one(
    selected: select_pairs.Args, margin: float, error: float | None, is_kept: bool
) -> None:
    pair = {"margin": margin, "margin_standard_error": error}
    args = replace(selected, min_margin_in_standard_errors=2.0)
    assert select_pairs.is_clear(pair, args) == is_kept
    assert select_pairs.is_clear(pair, replace(args, min_margin_in_standard_errors=0.0))


def test_rewards_by_derivative_rank_as_by_difference_and_say_how_far_they_are_off(
    scored: list[score_candidates.Args], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    args = replace(scored[0], rewards_by="derivative", output=tmp_path / "rewards.parquet")
    score_candidates.main(args)
    ours, theirs = keyed([scored[0].output]), keyed([args.output])
    rewards = np.array([[rows[key]["reward"] for key in ours] for rows in (ours, theirs)])
    assert np.abs(rewards[0]).max() > 0
    np.testing.assert_allclose(rewards[1], rewards[0], atol=0.02 * rewards[0].std())
    assert "rewards_by derivative is 0." in caplog.text
    assert "so far from" not in caplog.text


def test_a_policy_too_far_for_a_derivative_is_told(
    scored: list[score_candidates.Args],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(score_candidates, "MAX_BEND", 0.0)
    caplog.set_level("INFO")
    args = replace(scored[0], rewards_by="derivative", output=tmp_path / "rewards.parquet")
    score_candidates.main(args)
    assert "set score_candidates.rewards_by to difference" in caplog.text


def test_each_iteration_judges_with_draws_of_its_own(
    scored: list[score_candidates.Args], tmp_path: Path
) -> None:
    args = replace(scored[0], iteration=2, output=tmp_path / "rewards.parquet")
    score_candidates.main(args)
    for ours, theirs in zip(read_rows(scored[0].output), read_rows(args.output), strict=True):
        assert ours["draw_seed"] != theirs["draw_seed"]
        assert ours["timesteps"] != theirs["timesteps"]


@pytest.mark.parametrize(
    ("stage", "fixture", "module"),
    [
        (sample_candidates, "sampled", generation),
        (encode_preferences, "encoded", encode_preferences),
        (score_metric, "candidate_scores", score_metric),
    ],
)
def test_threads_beside_a_gpu_change_no_row(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stage: Any,
    fixture: str,
    module: Any,
) -> None:
    found = request.getfixturevalue(fixture)
    args = found[0] if isinstance(found, list) else found
    monkeypatch.setattr(module, "threads_beside", lambda device: 3)
    beside = replace(args, output=tmp_path / "table.parquet")
    stage.main(beside)
    assert read_rows(beside.output) == read_rows(args.output)
