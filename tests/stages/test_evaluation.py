"""generate_evaluation, score_metric, score_holdout and the two summaries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import (
    check_leakage,
    generate_evaluation,
    measure_diversity,
    sample_candidates,
    score_holdout,
    score_metric,
    select_pairs,
    select_prompts,
    summarise_evaluation,
    summarise_guards,
)
from stages.core.artifacts.schemas import (
    EVALUATION_PROMPTS,
    IMAGES,
    METRIC_SCORES,
    PAIR_LATENTS,
    PREFERENCES,
    PROMPTS,
)
from stages.core.artifacts.tables import read_metadata, write_table
from stages.core.errors import UserError
from stages.core.evaluation.guards import Limits
from stages.core.evaluation.perception import lab_levels, perceptual_distance
from stages.core.method.rewards import preference_probability
from stages.core.method.seeding import seed_of
from stages.shapes.oracle import ORACLES
from tests.builders import (
    CAPTIONS,
    image_value,
    picture,
    pixels_of,
    prompt_row,
    read_rows,
    settings,
)
from tests.builders import (
    encoded as encoded_image,
)

Row = dict[str, Any]

LIMITS = Limits()


def test_every_policy_draws_the_same_prompts_from_the_same_noise(
    evaluated: dict[str, generate_evaluation.Args],
) -> None:
    tables = {name: read_rows(args.output) for name, args in evaluated.items()}
    keys = [
        [(row["prompt_id"], row["candidate"], row["seed"]) for row in table]
        for table in tables.values()
    ]
    assert keys[0] == keys[1] == keys[2]
    assert len(keys[0]) == 8
    name, number, seed = keys[0][3]
    assert seed == seed_of(1234, "generate_evaluation", name, number)
    images = [[row["image"]["bytes"] for row in table] for table in tables.values()]
    assert images[0] != images[1] != images[2]
    assert "latents" not in tables["base"][0]


def test_evaluation_shards_give_the_same_images(
    evaluated: dict[str, generate_evaluation.Args], tmp_path: Path
) -> None:
    found: dict[tuple[str, int], Row] = {}
    for shard in range(3):
        args = replace(
            evaluated["base"], shard=shard, num_shards=3, output=tmp_path / f"{shard}.parquet"
        )
        generate_evaluation.main(args)
        found |= {(row["prompt_id"], row["candidate"]): row for row in read_rows(args.output)}
    expected = read_rows(evaluated["base"].output)
    assert len(found) == len(expected)
    for row in expected:
        other = pixels_of(found[row["prompt_id"], row["candidate"]]["image"])
        assert np.abs(pixels_of(row["image"]).astype(int) - other).max() <= 1


@pytest.mark.parametrize("metric", sorted(ORACLES))
def test_scores_are_the_oracles_of_the_decoded_pictures(
    sampled: list[sample_candidates.Args], tmp_path: Path, metric: str
) -> None:
    args = score_metric.Args(
        images=tuple(shard.output for shard in sampled),
        metric=metric,
        output=tmp_path / "scores.parquet",
    )
    score_metric.main(args)
    images = [row for shard in sampled for row in read_rows(shard.output)]
    images.sort(key=lambda row: (row["prompt_id"], row["candidate"]))  # whatever the shards are
    pixels = np.stack([pixels_of(row["image"]) for row in images]).astype(np.float32) / 255
    expected = ORACLES[metric](pixels, [row["prompt"] for row in images])
    rows = read_rows(args.output)
    assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in images]
    assert {row["metric"] for row in rows} == {metric}
    np.testing.assert_allclose([row["score"] for row in rows], expected, rtol=1e-6)


def images_table(path: Path, rows: list[Row]) -> Path:
    write_table(path, rows, IMAGES, stage="generate_evaluation", arguments={})
    return path


def image_row(prompt: str, pixels: np.ndarray) -> Row:
    image = image_value(encoded_image(pixels, "PNG"))
    return {**prompt_row(prompt), "candidate": 0, "seed": 0, "image": image}


@pytest.mark.parametrize(
    ("metric", "prompt", "size", "reason"),
    [
        ("beauty", CAPTIONS[0], 64, "no metric 'beauty'; expected one of colourfulness"),
        ("total", "a photo of a cat", 64, "'a photo of a cat' is not a caption"),
        ("total", CAPTIONS[0], 32, "64 x 64 pictures of the embedded world, found 32 x 32"),
    ],
)
def test_what_a_metric_cannot_score_is_refused(
    tmp_path: Path, metric: str, prompt: str, size: int, reason: str
) -> None:
    row = image_row(prompt, picture(CAPTIONS[0])[:size, :size])
    path = images_table(tmp_path / "images.parquet", [row])
    args = score_metric.Args(images=(path,), metric=metric, output=tmp_path / "s.parquet")
    with pytest.raises(UserError, match=reason):
        score_metric.main(args)
    assert not args.output.exists()


def test_held_out_rewards_are_judged_with_the_same_draws_for_every_policy(
    judged: list[score_holdout.Args],
) -> None:
    tables = [read_rows(args.output) for args in judged]
    assert [row["pair_id"] for row in tables[0]] == [row["pair_id"] for row in tables[1]]
    for row in tables[0] + tables[1]:
        margin = row["winner_reward"] - row["loser_reward"]
        assert row["probability"] == pytest.approx(preference_probability(margin, 5000.0), rel=1e-3)
        assert row["drift"] > 0
    assert tables[0][0]["winner_reward"] != tables[1][0]["winner_reward"]


def test_pairs_that_stopped_a_training_and_their_prompts_measure_no_judge(
    judged: list[score_holdout.Args], tmp_path: Path
) -> None:
    table = read_rows(judged[0].preferences)
    rows = [table[0] | {"pair_id": "another"}, *table]  # two pairs of the first prompt
    pairs = tmp_path / "pairs.parquet"
    write_table(pairs, rows, PREFERENCES, stage="import_preferences", arguments={})
    latents = read_rows(judged[0].latents)
    latents = [latents[0] | {"pair_id": "another"}, *latents]
    encoded = tmp_path / "latents.parquet"
    write_table(encoded, latents, PAIR_LATENTS, stage="encode_preferences", arguments={})
    args = replace(
        judged[0], preferences=pairs, latents=encoded, skip_pairs=1, output=tmp_path / "h.parquet"
    )
    score_holdout.main(args)
    left = [row["pair_id"] for row in table if row["prompt_id"] != table[0]["prompt_id"]]
    assert 0 < len(left) < len(table)
    assert [row["pair_id"] for row in read_rows(args.output)] == left
    whole = {row["pair_id"]: row for row in read_rows(judged[0].output)}
    assert read_rows(args.output) == [whole[name] for name in left]
    with pytest.raises(UserError, match="none is left to measure the judge on"):
        score_holdout.main(replace(args, skip_pairs=99))


def test_the_base_judges_held_out_pairs_with_reward_0_and_no_drift(
    judged: list[score_holdout.Args], tmp_path: Path
) -> None:
    args = replace(judged[0], policy="base", output=tmp_path / "holdout.parquet")
    score_holdout.main(args)
    for row in read_rows(args.output):
        assert (row["winner_reward"], row["loser_reward"], row["drift"]) == (0, 0, 0)
        assert row["probability"] == 0.5


def test_held_out_rewards_tell_both_policies_that_made_them(
    judged: list[score_holdout.Args], tmp_path: Path
) -> None:
    args = replace(judged[0], reference=judged[1].policy, output=tmp_path / "holdout.parquet")
    score_holdout.main(args)
    inputs = read_metadata(args.output)["inputs"]
    assert {f"{run.policy}/manifest.json" for run in judged} <= set(inputs)


def scores_table(path: Path, scores: dict[str, list[float]], metric: str = "total") -> Path:
    rows = [
        {"prompt_id": name, "candidate": number, "metric": metric, "score": value}
        for name, values in scores.items()
        for number, value in enumerate(values)
    ]
    write_table(path, rows, METRIC_SCORES, stage="score_metric", arguments={})
    return path


def summary_args(folder: Path, **changes: Any) -> summarise_evaluation.Args:
    """Arguments whose tables go to the folder."""
    tables = {name: folder / f"{name}.parquet" for name in ("summary", "breakdown")}
    return summarise_evaluation.Args(
        output=tables["summary"], breakdown=tables["breakdown"], **changes
    )


def keyed_prompts(path: Path, rows: list[Row]) -> Path:
    write_table(path, rows, EVALUATION_PROMPTS, stage="select_evaluation_prompts", arguments={})
    return path


def test_a_summary_tests_adjusts_and_breaks_down_by_style(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt_id": f"{style}{item}",
            "prompt": f"{style} {item - item % 2}",
            "category": style,
            "challenge": None,
            "item": item,
        }
        for style in ("anime", "photo")
        for item in range(20)
    ]
    names = [row["prompt_id"] for row in rows]
    base = {name: [float(rng.random())] for name in names}
    better = {name: [values[0] + 1 + float(rng.random())] for name, values in base.items()}
    files = (
        ("hpsv2", "base", scores_table(tmp_path / "base.parquet", base)),
        ("hpsv2", "iter00", scores_table(tmp_path / "iter00.parquet", better)),
        ("hpsv2", "iter01", scores_table(tmp_path / "iter01.parquet", better)),
    )
    prompts = (("hpsv2", keyed_prompts(tmp_path / "prompts.parquet", rows)),)
    args = summary_args(tmp_path, scores=files, prompts=prompts)
    summarise_evaluation.main(args)
    summary = {(row["policy"], row["baseline"]): row for row in read_rows(args.output)}
    won = summary["iter00", "base"]
    assert (won["num_wins"], won["num_ties"], won["num_losses"]) == (40, 0, 0)
    assert won["sign_p"] == pytest.approx(2 * 0.5**20)  # 20 texts, each of two prompts
    assert won["sign_p_holm"] == pytest.approx(3 * won["sign_p"])  # the smallest of three, twice
    same = summary["iter01", "iter00"]
    assert (same["sign_p"], same["wilcoxon_p"], same["sign_p_holm"]) == (1, 1, 1)
    assert (same["num_ties"], same["win_low"], same["win_high"]) == (40, 0.5, 0.5)
    parts = read_rows(args.breakdown)
    assert {(row["axis"], row["group"], row["num_prompts"]) for row in parts} == {
        ("category", "anime", 20),
        ("category", "photo", 20),
    }
    anime = next(
        row
        for row in parts
        if (row["group"], row["policy"], row["baseline"]) == ("anime", "iter00", "base")
    )
    gaps = [better[name][0] - base[name][0] for name in names[:20]]
    assert anime["difference"] == pytest.approx(np.mean(gaps), abs=1e-6)


def test_what_the_better_of_two_images_gains_is_told_of_each_baseline(tmp_path: Path) -> None:
    # Of 1, 2 and 4 the distances are 1, 3 and 2: half their mean is 1. Of 0 and 1 it is a half.
    base = {"a": [1.0, 2.0, 4.0], "b": [0.0, 1.0], "c": [7.0]}
    tuned = {"a": [2.0, 2.0, 2.0], "b": [2.0, 2.0], "c": [7.0]}
    single = {name: values[:1] for name, values in base.items()}
    files = {
        "base": scores_table(tmp_path / "base.parquet", base),
        "iter00": scores_table(tmp_path / "iter00.parquet", tuned),
    }
    args = summary_args(tmp_path, scores=tuple(("set", *item) for item in files.items()))
    summarise_evaluation.main(args)
    rows = read_rows(args.output)
    assert [row["better_of_two"] for row in rows if row["baseline"] == "base"] == [0.75, 0.75]

    scores_table(files["base"], single)
    scores_table(files["iter00"], single)
    summarise_evaluation.main(args)
    assert {row["better_of_two"] for row in read_rows(args.output)} == {None}


@pytest.fixture
def two_runs(
    evaluated: dict[str, generate_evaluation.Args], tmp_path: Path
) -> dict[str, score_metric.Args]:
    """The scores of both policies' images, as two runs might have them."""
    runs = {}
    for name, images in evaluated.items():
        runs[name] = score_metric.Args(
            images=(images.output,), metric="total", output=tmp_path / f"{name}-scores.parquet"
        )
        score_metric.main(runs[name])
    return runs


def test_a_policy_of_another_run_is_paired_with_every_policy(
    two_runs: dict[str, score_metric.Args], tmp_path: Path
) -> None:
    args = summary_args(
        tmp_path,
        scores=tuple(("mine", name, two_runs[name].output) for name in ("base", "iter00")),
        others=(("mine", "theirs/iter01", two_runs["iter01"].output),),
    )
    summarise_evaluation.main(args)
    rows = {(row["policy"], row["baseline"]): row for row in read_rows(args.output)}
    assert list(rows)[2:] == [("base", "theirs/iter01"), ("iter00", "theirs/iter01")]
    theirs = [row["score"] for row in read_rows(two_runs["iter01"].output)]
    ours = [row["score"] for row in read_rows(two_runs["iter00"].output)]
    found = rows["iter00", "theirs/iter01"]["difference"]
    assert found == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-6)


def test_a_run_from_other_noise_is_not_paired(
    two_runs: dict[str, score_metric.Args],
    evaluated: dict[str, generate_evaluation.Args],
    tmp_path: Path,
) -> None:
    images = replace(evaluated["iter01"], seed=99, output=tmp_path / "images.parquet")
    generate_evaluation.main(images)
    other = replace(two_runs["iter01"], images=(images.output,), output=tmp_path / "other.parquet")
    score_metric.main(other)
    args = summary_args(
        tmp_path,
        scores=(("mine", "base", two_runs["base"].output),),
        others=(("mine", "theirs/iter01", other.output),),
    )
    with pytest.raises(UserError, match="not sampled from the same noise"):
        summarise_evaluation.main(args)
    images.output.unlink()
    with pytest.raises(UserError, match="images that are not there any more"):
        summarise_evaluation.main(args)


def leakage_args(folder: Path, *, allow: bool) -> check_leakage.Args:
    sets = {"mine": ["A Cat", "a dog"], "seed": ["a  cat"], "iter01": ["a bird"]}
    for name, prompts in sets.items():
        rows = [prompt_row(prompt) for prompt in prompts]
        write_table(folder / f"{name}.parquet", rows, PROMPTS, stage="select_prompts", arguments={})
    named = {name: (name, folder / f"{name}.parquet") for name in sets}
    return check_leakage.Args(
        evaluation=(named["mine"],),
        training=(named["seed"], named["iter01"]),
        allow=allow,
        output=folder / "leakage.parquet",
    )


def test_evaluation_prompts_that_a_training_sees_are_refused(tmp_path: Path) -> None:
    args = leakage_args(tmp_path, allow=False)
    with pytest.raises(UserError, match="1 of 2 prompts of mine stand in seed .as 'A Cat'"):
        check_leakage.main(args)
    assert not args.output.exists()


def test_allowed_leakage_is_counted(tmp_path: Path) -> None:
    args = leakage_args(tmp_path, allow=True)
    check_leakage.main(args)
    rows = read_rows(args.output)
    assert [(row["source"], row["num_prompts"], row["num_shared"]) for row in rows] == [
        ("seed", 2, 1),
        ("iter01", 2, 0),
    ]
    assert [row["examples"] for row in rows] == [["A Cat"], []]


def test_a_summary_compares_each_policy_with_each_earlier_one_by_prompt(tmp_path: Path) -> None:
    scores = {
        "base": {"a": [1.0, 3.0], "b": [2.0, 2.0], "c": [0.0, 0.0]},
        "iter00": {"b": [3.0, 4.0], "a": [2.0, 2.0], "c": [1.0, 0.0]},
        "iter01": {"c": [5.0, 5.0], "a": [1.0, 0.0], "b": [2.0, 3.0]},
    }
    files = [
        ("mine", name, scores_table(tmp_path / f"{name}.parquet", values))
        for name, values in scores.items()
    ]
    args = summary_args(tmp_path, scores=tuple(files))
    summarise_evaluation.main(args)
    rows = {(row["policy"], row["baseline"]): row for row in read_rows(args.output)}
    assert list(rows) == [
        ("base", "base"),
        ("iter00", "base"),
        ("iter01", "base"),
        ("iter01", "iter00"),
    ]
    first = rows["iter00", "base"]  # prompts' means 2, 3.5, 0.5 against 2, 2, 0
    assert (first["mean"], first["baseline_mean"]) == (pytest.approx(2.0), pytest.approx(4 / 3))
    assert first["difference"] == pytest.approx(2 / 3)
    assert first["win_rate"] == pytest.approx(2.5 / 3)
    assert first["ci_low"] <= first["difference"] <= first["ci_high"]
    assert (first["prompt_set"], first["metric"], first["num_prompts"]) == ("mine", "total", 3)
    last = rows["iter01", "iter00"]  # 0.5, 2.5, 5 against 2, 3.5, 0.5
    assert last["difference"] == pytest.approx((-1.5 - 1 + 4.5) / 3)
    assert last["win_rate"] == pytest.approx(1 / 3)
    same = rows["base", "base"]
    assert (same["difference"], same["win_rate"]) == (0, 0.5)


def test_policies_scored_on_other_prompts_are_not_compared(tmp_path: Path) -> None:
    files = (
        ("mine", "base", scores_table(tmp_path / "a.parquet", {"a": [1.0], "b": [2.0]})),
        ("mine", "iter00", scores_table(tmp_path / "b.parquet", {"a": [1.0], "c": [2.0]})),
    )
    args = summary_args(tmp_path, scores=files)
    with pytest.raises(UserError, match="iter00 was scored on 2 prompts.*not the same"):
        summarise_evaluation.main(args)
    assert not args.output.exists()


@pytest.fixture
def guards(
    judged: list[score_holdout.Args],
    diversity: list[measure_diversity.Args],
    selected: select_pairs.Args,
    candidate_scores: score_metric.Args,
    prompts: select_prompts.Args,
    tiny_base: str,
    tmp_path: Path,
) -> summarise_guards.Args:
    """Guards of iterations 0 and 1."""
    weighted = replace(
        selected, judged=tmp_path / "judged.parquet", output=tmp_path / "pairs.parquet"
    )
    select_pairs.main(weighted)
    return summarise_guards.Args(
        holdout=tuple(args.output for args in judged),
        diversity=tuple(args.output for args in diversity),
        pairs=(selected.output,),
        rewards=((1, tmp_path / "judged.parquet"),),
        candidate_scores=((1, candidate_scores.output),),
        prompts=(prompts.output,),
        model=settings(tiny_base),
        limits=LIMITS,
        output=tmp_path / "guards.parquet",
        reliability=tmp_path / "reliability.parquet",
    )


def by_eye(one: np.ndarray, other: np.ndarray) -> float:
    levels = [lab_levels(picture.round().astype(np.uint8)) for picture in (one, other)]
    return perceptual_distance(*levels)


def test_guards_are_what_the_tables_of_their_iteration_give_by_brute_force(
    guards: summarise_guards.Args, evaluated: dict[str, generate_evaluation.Args]
) -> None:
    summarise_guards.main(guards)
    rows = read_rows(guards.output)
    assert [(row["iteration"], row["policy"]) for row in rows] == [(0, "iter00"), (1, "iter01")]
    for row, path in zip(rows, guards.holdout, strict=True):
        judged = read_rows(path)
        right = [pair["winner_reward"] > pair["loser_reward"] for pair in judged]
        assert row["reward_accuracy"] == np.mean(right)
        assert row["num_holdout_pairs"] == 2
        assert row["reward_accuracy_low"] <= row["reward_accuracy"] <= row["reward_accuracy_high"]
        assert row["drift"] == pytest.approx(np.mean([pair["drift"] for pair in judged]))
    for row in rows:
        by_prompt: dict[str, list[np.ndarray]] = {}
        for image in read_rows(evaluated[row["policy"]].output):
            by_prompt.setdefault(image["prompt_id"], []).append(pixels_of(image["image"]) / 255.0)
        gaps = [np.sqrt(((a - b) ** 2).mean()) for a, b in by_prompt.values()]
        assert row["diversity"] == pytest.approx(np.mean(gaps))
        seen = [by_eye(a * 255, b * 255) for a, b in by_prompt.values()]
        assert row["feature_diversity"] == pytest.approx(np.mean(seen))
        assert row["features"] == "perceptual"
    names = ("rank_correlation", "best_beats_worst", "confident_share")
    assert [rows[0][name] for name in names] == [None, None, None]
    pairs = read_rows(guards.pairs[0])
    scores = {
        (row["prompt_id"], row["candidate"]): row["score"]
        for row in read_rows(guards.candidate_scores[0][1])
    }
    wins = [
        scores[p["prompt_id"], p["winner_candidate"]] > scores[p["prompt_id"], p["loser_candidate"]]
        for p in pairs
    ]
    assert rows[1]["best_beats_worst"] == np.mean(wins)
    assert rows[1]["confident_share"] == np.mean([pair["probability"] > 0.9 for pair in pairs])
    assert -1 <= rows[1]["rank_correlation"] <= 1


def test_guards_without_a_candidate_metric_leave_its_measures_out(
    guards: summarise_guards.Args,
) -> None:
    args = replace(guards, candidate_scores=())
    summarise_guards.main(args)
    row = read_rows(args.output)[1]
    assert (row["rank_correlation"], row["best_beats_worst"]) == (None, None)
    assert row["confident_share"] is not None


def test_reliability_is_that_of_the_held_out_pairs(guards: summarise_guards.Args) -> None:
    summarise_guards.main(guards)
    rows = read_rows(guards.reliability)
    for iteration, path in enumerate(guards.holdout):
        judged = [row["probability"] for row in read_rows(path)]
        found = [row for row in rows if row["iteration"] == iteration]
        assert sum(row["num_pairs"] for row in found) == len(judged)
        right = sum(row["num_pairs"] * row["share_right"] for row in found)
        assert right == pytest.approx(sum(p > 0.5 for p in judged))


def test_blank_images_and_cut_prompts_are_counted_and_said(
    guards: summarise_guards.Args, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    black = np.zeros((64, 64, 3), np.uint8)
    red = np.full((64, 64, 3), (200, 10, 10), np.uint8)
    rows = [
        {**image_row(CAPTIONS[0], image), "candidate": number}
        for number, image in enumerate((black, red, picture(CAPTIONS[0]), picture(CAPTIONS[1])))
    ]
    path = images_table(tmp_path / "images.parquet", rows)
    texts = [prompt_row(CAPTIONS[0]), prompt_row("a small red triangle " * 40)]
    prompts = tmp_path / "texts.parquet"
    write_table(prompts, texts, PROMPTS, stage="select_prompts", arguments={})
    measured = measure_diversity.Args(
        images=(path,), features="perceptual", output=tmp_path / "diversity.parquet"
    )
    measure_diversity.main(measured)
    args = replace(
        guards,
        diversity=(measured.output, guards.diversity[1]),
        prompts=(prompts,),
        limits=replace(LIMITS, max_drift=1e-12),
    )
    summarise_guards.main(args)
    first, second = read_rows(args.output)
    assert (first["blank_share"], first["truncated_share"]) == (0.5, 0.5)
    assert second["truncated_share"] == 0.5
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for part in (
        "50.0% of the images of iter00 are black",
        "50.0% of the evaluation prompts are",
        "iter01 has drifted",
    ):
        assert sum(part in sentence for sentence in said) == 1, part
