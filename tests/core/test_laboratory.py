"""The plan of the laboratory, its intervals and verdicts by hand-worked numbers, and its page."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from stages.core.errors import UserError
from stages.core.laboratory.calls import denoiser_calls
from stages.core.laboratory.experiments import (
    Claim,
    Experiment,
    Run,
    Side,
    as_yaml,
    chosen,
    plan_runs,
    read_base,
    read_experiment,
)
from stages.core.laboratory.figure import draw_arm, figure, places_of
from stages.core.laboratory.memory import (
    Measured,
    as_text,
    found_in,
    of_results,
    read_memory,
    with_new,
)
from stages.core.laboratory.page import page
from stages.core.laboratory.verdicts import compared, interval, judge, value_of
from stages.core.plan.configuration import check_config, merged, read_config

ROOT = Path(__file__).resolve().parents[2]
BASE = read_base([ROOT / "config" / "config.yaml"])
Values = dict[tuple[str, int, str, str], float]
NONE = {"mix_preferences": {"seed_fraction": 0.0}}


def experiment(name: str, arms: Mapping[str, Any], seeds: tuple[int, ...] = (1, 2)) -> Experiment:
    return Experiment(name, name, "", seeds, arms, ())


def test_runs_that_share_policy_0_adopt_it_and_equal_runs_are_one() -> None:
    first = experiment("a", {"usual": {}, "none": {"mix_preferences": {"seed_fraction": 0.0}}})
    more = {"preferences": {"num_pairs": 64}}
    second = experiment("b", {"plain": {}, "few": more, "few-none": {**more, **first.arms["none"]}})
    runs = {run.name: run for run in plan_runs([first, second], BASE)}
    assert list(runs) == [
        "lab-a-usual-1", "lab-a-none-1", "lab-b-few-1", "lab-b-few-none-1",
        "lab-a-usual-2", "lab-a-none-2", "lab-b-few-2", "lab-b-few-none-2",
    ]  # fmt: skip
    assert runs["lab-a-usual-1"].used_by == (("a", "usual"), ("b", "plain"))
    owners = {name: run.owner for name, run in runs.items()}
    assert owners["lab-a-usual-1"] == owners["lab-a-none-1"] == "lab-a-usual-1"
    assert owners["lab-b-few-none-1"] == "lab-b-few-1"
    assert owners["lab-a-none-2"] == "lab-a-usual-2"
    adopted = runs["lab-a-none-1"].overlay
    assert adopted == {
        "run": "lab-a-none-1",
        "seed": 1,
        "mix_preferences": {"seed_fraction": 0.0},
        "train_seed": {"policy": "results/lab-a-usual-1/iter00/policy"},
    }
    assert "train_seed" not in runs["lab-a-usual-1"].overlay


@pytest.mark.parametrize(
    "over",
    [
        {"train_seed": {"learning_rate": 1.0e-5}},
        {"preferences": {"num_holdout": 100}},
        {"shapes": {"label_temperature": 0.4}},
        {"model": {"dtype": "bfloat16"}},
    ],
)
def test_whatever_policy_0_comes_from_parts_its_runs(over: dict[str, Any]) -> None:
    runs = plan_runs([experiment("a", {"usual": {}, "other": over}, (1,))], BASE)
    assert [run.owner for run in runs] == [run.name for run in runs]


def test_what_the_guards_do_parts_runs_which_share_policy_0() -> None:
    over = {"guards": {"on_collapse": "rollback"}}
    runs = plan_runs([experiment("a", {"usual": {}, "back": over}, (1,))], BASE)
    assert [run.name for run in runs] == ["lab-a-usual-1", "lab-a-back-1"]
    assert [run.owner for run in runs] == ["lab-a-usual-1", "lab-a-usual-1"]


def test_runs_whose_seed_training_follows_decisions_train_their_own_policy_0() -> None:
    common = {"train_seed": {"use_decisions": True}}
    none = merged(common, {"mix_preferences": {"seed_fraction": 0.0}})
    runs = plan_runs([experiment("a", {"usual": common, "none": none}, (1,))], BASE)
    assert [run.owner for run in runs] == [run.name for run in runs]
    for run in runs:
        check_config(merged(BASE, run.overlay))


def test_a_run_without_iterations_trains_its_own_policy_0() -> None:
    runs = plan_runs([experiment("a", {"usual": {}, "base": {"iterations": 0}}, (1,))], BASE)
    assert [run.owner for run in runs] == [run.name for run in runs]
    assert "train_seed" not in runs[1].overlay


def test_an_overlay_in_one_line_keeps_its_numbers() -> None:
    over = {"run": "x", "train_seed": {"learning_rate": 1.0e-5, "passes": 10.0}, "iterations": 3}
    text = as_yaml(over)
    assert "\n" not in text
    assert yaml.safe_load(text) == over


def test_every_experiment_of_the_repository_plans_runs_with_shared_seed_policies() -> None:
    found = [read_experiment(path) for path in sorted((ROOT / "config" / "lab").glob("*.yaml"))]
    assert len(found) >= 3
    runs = plan_runs(found, BASE)
    assert all(len(each.seeds) >= 5 for each in found)
    trained = [run for run in runs if run.owner == run.name]
    assert len(trained) < len(runs) / 3 + 10
    used = {use for run in runs for use in run.used_by}
    assert {("weights-reference", "uniform"), ("seed-rates", "gentle")} <= used
    tuned = [run for run in runs if run.seed >= 100]
    assert {run.overlay["shapes"]["evaluation_fold"] for run in tuned} == {"tuning"}
    names = [run.name for run in runs]
    assert all(names.index(run.owner) <= names.index(run.name) for run in runs)
    assert len(plan_runs(chosen(found, (7,)), BASE)) == len(runs) // 5
    names_of = [each.name for each in found]
    assert names_of == sorted(names_of)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title: x", "is no experiment"),
        ("[1]", "is no experiment"),
        (
            "{title: x, source: y, seeds: [1], arms: {a: }, claims: [{says: z, compare: "
            "[{measure: total, left: b/last, right: a/last}]}]}",
            "names the arm 'b'; the arms are a",
        ),
        (
            "{title: x, source: y, seeds: [1], arms: {a: }, claims: [{says: z, compare: "
            "[{measure: total, left: a, right: a/last}]}]}",
            "'a' is no side; write arm/policy",
        ),
    ],
)
def test_a_wrong_experiment_is_told_by_its_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as raised:
        read_experiment(path)
    assert "mine.yaml" in str(raised.value)


def test_an_arm_with_a_wrong_key_is_told_by_experiment_and_arm() -> None:
    with pytest.raises(UserError, match=r"(?s)experiment a, arm bad: .*'iteratons'"):
        plan_runs([experiment("a", {"bad": {"iteratons": 3}})], BASE)


def test_the_interval_of_two_seeds_by_hand_and_of_five_by_enumeration() -> None:
    # resamples of (0, 1) have the means 0, 1/2, 1/2, 1
    assert interval([0.0, 1.0]) == pytest.approx((0.0375, 0.9625))
    values = [0.1, 0.3, -0.2, 0.5, 0.2]
    means = [np.mean(each) for each in itertools.product(values, repeat=5)]
    assert interval(values) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    low, high = interval([0.4])
    assert (low, high) == (0.4, 0.4)
    assert all(map(math.isnan, interval([])))


def test_the_interval_of_many_seeds_is_about_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).standard_normal(200)
    low, high = interval(values.tolist())
    half = 1.96 * values.std() / 200**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


LEFT, RIGHT = Side("new", "last"), Side("old", "iter01")


def measured(differences: list[float], measure: str = "total") -> Values:
    found: Values = {}
    for seed, difference in enumerate(differences):
        found["new", seed, "iter02", measure] = 1.0 + difference
        found["new", seed, "iter01", measure] = 99.0
        found["new", seed, "base", measure] = 99.0
        found["old", seed, "iter01", measure] = 1.0
    return found


def test_arms_are_paired_by_seed_and_a_seed_that_lacks_one_is_left_out() -> None:
    values = measured([0.1, 0.2, 0.3])
    del values["old", 1, "iter01", "total"]
    found = compared("total", LEFT, RIGHT, values)
    assert found.differences == pytest.approx((0.1, 0.3))
    assert found.mean == pytest.approx(0.2)
    assert value_of(LEFT, 0, "total", values) == pytest.approx(1.1)  # the last is iter02
    assert value_of(Side("new", "iter07"), 0, "total", values) is None


@pytest.mark.parametrize(
    ("totals", "matches", "expected"),
    [
        ([0.1, 0.2, 0.1, 0.2, 0.3], [0.1] * 5, "holds"),
        ([0.1, 0.2, 0.1, 0.2, 0.3], [-0.1] * 5, "holds in part"),
        ([0.1, -0.2, 0.1, -0.2, 0.1], [-0.1] * 5, "does not hold here"),
        ([0.1, 0.2, 0.1, 0.2], [0.1] * 4, "too few seeds"),
        ([], [], "not measured"),
        ([0.1] * 5, [], "not measured"),
    ],
)
def test_verdicts(totals: list[float], matches: list[float], expected: str) -> None:
    claim = Claim("x", (("total", LEFT, RIGHT), ("match", LEFT, RIGHT)), "")
    assert judge(claim, measured(totals) | measured(matches, "match"))[0] == expected


def test_the_page_gives_advice_for_what_holds_and_names_runs_that_did_not_finish() -> None:
    claim = Claim("New is better", (("total", LEFT, RIGHT),), "new: true")
    found = Experiment("e", "An experiment", "Asked.", (0, 1), {"new": {}, "old": {}}, (claim,))
    rows: list[dict[str, Any]] = [
        {
            "run": f"lab-{arm}-{seed}", "experiment": "e", "arm": arm, "seed": seed, "status": "finished",
            "policy": policy, "measure": measure, "value": value, "commit": "abcdef0123456789",
            "machine": "x86_64, 2 cores, Linux",
        }
        for (arm, seed, policy, measure), value in measured([0.1] * 5).items()
    ]  # fmt: skip
    text = page([found], rows)
    assert "| New is better | holds | new: true |" in text
    assert "total | new/last | old/iter01 | +0.100 [+0.100, +0.100] | 5 |" in text
    assert "Runs: 10 finished. Commits: abcdef012345. Machines: x86_64, 2 cores, Linux." in text
    open_run = rows[0] | {"run": "lab-new-9", "seed": 9, "status": "not finished", "value": None}
    assert "Not finished: lab-new-9." in page([found], [*rows, open_run])
    empty = page([found], [])
    assert "| New is better | not measured |  |" in empty
    assert "No run has finished yet." in empty


def test_a_figure_has_the_means_over_seeds_and_is_the_same_text_each_time() -> None:
    found = Experiment("e", "An experiment", "Asked.", (0, 1), {"new": {}, "old": {}}, ())
    values = measured([0.1, 0.2, 0.3])
    assert figure(found, {}) is None
    assert figure(found, {("new", 0, "base", "other"): 1.0}) is None
    assert figure(found, values) == figure(found, dict(reversed(values.items())))
    assert figure(found, values) != figure(found, measured([0.1, 0.2, 0.4]))
    axes = Figure().subplots()
    places = places_of(found, "new", 0, ["iter00", "iter01", "iter02"], values)
    draw_arm(axes, 0, "new", "total", places, values)
    [line] = axes.get_lines()
    # Of 1.1, 1.2 and 1.3; the arm has no policy iter00.
    assert [tuple(map(float, point)) for point in line.get_xydata()][-1] == pytest.approx((2, 1.2))


def test_a_figure_by_calls_has_each_policy_where_its_calls_are() -> None:
    found = Experiment(
        "e", "An experiment", "Asked.", (0,), {"new": {}, "old": {}}, (), "denoiser_calls"
    )
    calls = {("new", 0, "base"): 0.0, ("new", 0, "iter02"): 5_500.0, ("old", 0, "iter02"): 9_000.0}
    values = measured([0.1]) | {(*key, "denoiser_calls"): value for key, value in calls.items()}
    assert places_of(found, "new", 1, ["base", "iter02"], values) == {"base": 0.0, "iter02": 5.5}
    axes = Figure().subplots()
    draw_arm(axes, 0, "new", "total", {"base": 0.0, "iter02": 5.5}, values)
    [line] = axes.get_lines()
    assert [float(x) for x, _ in line.get_xydata()] == [0.0, 5.5]
    drawn = figure(found, values)
    assert drawn is not None
    assert b"thousand denoiser calls" in drawn
    assert drawn != figure(replace(found, by="policy"), values)


def measured_of(run: Run, **over: Any) -> Measured:
    facts = {"command": "snakemake ...", "commit": "abc", "machine": "m", "run_seconds": 1.0}
    return Measured(
        config=copy.deepcopy(of_results(run.config)),
        measures={"iter00": {"total": 2.5}},
        **facts | over,
    )


def test_a_run_that_was_measured_before_is_known_by_its_config_and_not_by_its_name() -> None:
    one, other = plan_runs([experiment("a", {"usual": {}, "none": NONE}, (1,))], BASE)
    again = plan_runs([experiment("b", {"less": NONE}, (1,))], BASE)[0]
    memory = [measured_of(one), measured_of(other, commit="def")]
    found = found_in(memory, again)
    assert found is not None
    assert found.commit == "def"
    next_seed = plan_runs([experiment("b", {"less": NONE}, (2,))], BASE)[0]
    assert found_in(memory, next_seed) is None


def test_a_key_that_is_newer_than_a_record_must_have_its_default() -> None:
    run = plan_runs([experiment("a", {"usual": {}}, (1,))], BASE)[0]
    old = measured_of(run)
    del old.config["score_candidates"]["snr_power"]  # as if nobody had known it then
    assert old.is_of(run)
    changed = {"score_candidates": {"weights": "inverse_snr", "snr_power": 0.5}}
    newer = plan_runs([experiment("a", {"usual": changed}, (1,))], BASE)[0]
    old.config["score_candidates"]["weights"] = "inverse_snr"
    assert not old.is_of(newer)
    assert not old.is_of(run)


def test_what_is_measured_again_takes_the_place_of_its_older_record(tmp_path: Path) -> None:
    one, other = plan_runs([experiment("a", {"usual": {}, "none": NONE}, (1,))], BASE)
    old = [measured_of(one, commit="old"), measured_of(other, commit="old")]
    now = with_new(old, {one.name: (one, measured_of(one, commit="new"))})
    assert [each.commit for each in now] == ["old", "new"]
    path = tmp_path / "measured.jsonl"
    assert read_memory(path) == []
    path.write_text(as_text(now))
    assert read_memory(path) == now


def test_a_line_that_is_no_measured_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    run = plan_runs([experiment("a", {"usual": {}}, (1,))], BASE)[0]
    path.write_text(as_text([measured_of(run)]) + '{"config": {}}\n')
    with pytest.raises(UserError, match=r"measured.jsonl, line 2 is no measured run"):
        read_memory(path)


def test_the_denoisers_calls_of_the_default_run_by_hand() -> None:
    config = read_config(ROOT / "config/config.yaml")
    seed = 512 * 10 * 4  # pairs, passes, two images by two models
    update = (140 + 47) * 6 * 4
    each = 140 * 12 * (12 * 2 + 10 * 2) + update
    assert denoiser_calls(config) == {
        "base": 0, "iter00": seed, "iter01": seed + each, "iter02": seed + 2 * each,
        "iter03": seed + 3 * each,
    }  # fmt: skip
    assert seed + each == 98_888


def test_the_denoisers_calls_of_cheaper_candidates_by_hand() -> None:
    config = merged(
        read_config(ROOT / "config/config.yaml"),
        {
            "iterations": 1,
            "train_seed": {"policy": "base"},
            "sample_candidates": {
                "candidates_per_prompt": 6,
                "sampling": {"sampler": "dpm", "num_inference_steps": 5, "guidance_interval": [0, 0.6]},
            },
            "score_candidates": {"weights": "calibrated", "num_draws": 4},
        },
    )  # fmt: skip
    of_weights = 200 * 10 * 4
    each = 140 * 6 * (3 * 2 + 2 + 4 * 2)
    found = denoiser_calls(check_config(config))
    assert found == {"base": 0, "iter00": 0, "iter01": each + of_weights + 187 * 6 * 4}
    unguided = check_config(merged(config, {"sampling": {"guidance_scale": 1.0}}))
    assert denoiser_calls(unguided)["iter01"] == 140 * 6 * 13 + of_weights + 187 * 6 * 4
    lists = check_config(merged(config, {"select_pairs": {"strategy": "listwise"}}))
    assert denoiser_calls(lists)["iter01"] == each + of_weights + (140 * 3 + 47) * 6 * 4


def test_calls_that_no_config_says_are_none() -> None:
    config = read_config(ROOT / "config/config.yaml")
    for changes in ({"preferences": {"num_pairs": None}}, {"train_seed": {"loss": "mapo"}}):
        assert denoiser_calls(merged(config, changes)) == {}
