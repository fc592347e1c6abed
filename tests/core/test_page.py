"""What the page says of comparisons, categories, other runs and the paper's numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stages.core.artifacts.judges import JudgeRecord
from stages.core.evaluation.gates import Gate
from stages.core.evaluation.guards import Limits
from stages.core.evaluation.paper import read_paper_tables
from stages.core.evaluation.statistics import ReliabilityBin
from stages.core.evaluation.verdicts import Evaluation, verdict
from stages.core.evaluation.wording import p_value
from stages.core.report.figures import reliability_panel
from stages.core.report.guard_rows import guards_view
from stages.core.report.page import (
    breakdown_view,
    gates_view,
    headline,
    judge_panels,
    leakage_view,
    others_view,
    paper_view,
)

Row = dict[str, Any]
SD15 = [row for row in read_paper_tables() if row.model == "sd15"]


def comparison(policy: str, mean: float, baseline: str, baseline_mean: float, **more: Any) -> Row:
    """A row of a summary; its interval is 0.1 wide on each side."""
    difference = mean - baseline_mean
    return {
        "prompt_set": "pickapic",
        "metric": "pickscore",
        "policy": policy,
        "baseline": baseline,
        "num_prompts": 500,
        "mean": mean,
        "baseline_mean": baseline_mean,
        "difference": difference,
        "ci_low": difference - 0.1,
        "ci_high": difference + 0.1,
        "win_rate": 0.6,
        "win_low": 0.56,
        "win_high": 0.64,
        "num_wins": 300,
        "num_ties": 0,
        "num_losses": 200,
        "sign_p": 0.0001,
        "wilcoxon_p": 0.002,
        "effect_size": 0.3,
        "sign_p_holm": 0.0004,
        "wilcoxon_p_holm": 0.008,
        "better_of_two": 0.5,
        **more,
    }


def evaluation(base: float, last: float, **more: Any) -> Evaluation:
    rows = [comparison("base", base, "base", base, **more)]
    rows.append(comparison("iter00", last, "base", base, **more))
    rows.append(comparison("iter00", last, "theirs/iter03", 20.9, **more))
    return Evaluation(rows, ["base", "iter00"])


def test_policies_of_other_runs_are_no_policies_of_this_one() -> None:
    found = evaluation(20.6, 20.8)
    assert found.policies == ["base", "iter00"]
    assert found.others == ["theirs/iter03"]
    (row,) = others_view(found)
    assert (row["policy"], row["other"], row["p"]) == ("iter00", "theirs/iter03", "0.008")
    assert row["difference"]["difference"] == "−0.10"
    assert row["wins"] == {"share": "60 %", "interval": "56 to 64 %"}


def test_the_base_and_its_distance_from_the_papers_lead_the_papers_rows() -> None:
    tables = paper_view(SD15, evaluation(20.60, 20.81), [])
    assert [table["table"] for table in tables] == [1, 3, 6]  # those with PickScore on Pick-a-Pic
    first = tables[0]
    assert first["columns"] == ["pickapic pickscore"]
    assert [(row["name"], row["cells"]) for row in first["rows"][:5]] == [
        ("base (this run)", ["20.60"]),
        ("difference of base from the paper's", ["−0.02"]),
        ("iter00 (this run)", ["20.81"]),
        ("paper: base", ["20.62"]),
        ("paper: DiffusionDPO", ["21.07"]),
    ]
    assert not first["is_far"]


def test_a_base_far_from_the_papers_is_marked() -> None:
    table = paper_view(SD15, evaluation(20.50, 20.81), [])[0]
    assert table["is_far"]
    assert table["rows"][1]["cells"] == ["−0.12 ⚠"]


def test_styles_come_from_the_breakdown() -> None:
    whole = {"prompt_set": "hpsv2", "metric": "hpsv2"}
    parts = [
        comparison(policy, mean, "base", 27.2, axis="category", group="anime", **whole)
        for policy, mean in (("base", 27.2), ("iter00", 27.5))
    ]
    (table, other) = paper_view(SD15, evaluation(27.0, 27.3, **whole), parts)
    assert (table["table"], other["table"]) == (1, 3)
    assert table["columns"] == ["hpsv2 anime hpsv2"]
    assert [row["cells"] for row in table["rows"][:4]] == [
        ["27.20"],
        ["−0.03"],
        ["27.50"],
        ["27.23"],
    ]
    (view,) = breakdown_view(parts, evaluation(27.0, 27.3, **whole))
    assert (view["axis"], view["metric"], view["policy"]) == ("category", "hpsv2", "iter00")
    assert [(row["group"], row["difference"]) for row in view["rows"]] == [("anime", "+0.30")]


def test_a_run_without_the_papers_metrics_shows_none_of_its_tables() -> None:
    assert paper_view(SD15, evaluation(1.0, 2.0, prompt_set="shapes", metric="total"), []) == []


def test_shared_prompts_are_marked() -> None:
    rows = [{"num_shared": count, "source": "seed"} for count in (0, 2)]
    assert [row["is_shared"] for row in leakage_view(rows)] == [False, True]


def test_a_reliability_panel_tells_its_numbers_in_words() -> None:
    point = ReliabilityBin(
        num_pairs=25, mean_probability=0.8, share_right=0.6, share_low=0.4, share_high=0.77
    )
    svg = reliability_panel("Reliability of iter01", [point])
    assert 'aria-label="Reliability of iter01: 80 % sure, 60 % right of 25"' in svg


def test_p_values_in_words() -> None:
    assert (p_value(0.0004), p_value(0.0123), p_value(1.0)) == ("< 0.001", "0.012", "1.000")


def test_the_headline_is_of_the_last_good_policy() -> None:
    rows = [
        comparison(policy, mean, base, 20.6)
        for policy, mean, base in (
            ("base", 20.6, "base"),
            ("iter00", 21.0, "base"),
            ("iter01", 19.0, "base"),
            ("iter01", 19.0, "iter00"),
        )
    ]
    found = Evaluation(rows, ["base", "iter00", "iter01"])
    said = {
        good: headline(found, "pickapic", "pickscore", good)["overall"].sentence
        for good in (None, "iter01", "iter00", "base")
    }
    assert said["iter00"].startswith("iter00 is higher than base")
    assert {said[None], said["iter01"], said["base"]} == {said[None]}
    assert said[None].startswith("iter01 is lower than base")
    assert len(headline(found, "pickapic", "pickscore", "iter00")["steps"]) == 2


def test_gates_are_shown_only_where_there_are_any() -> None:
    assert gates_view([], 3) is None
    gate = Gate(
        iteration=1,
        policy="iter01",
        on_collapse="stop",
        findings=("It drew black.",),
        last_good="iter00",
        go_on_from="",
        limits={},
    )
    view = gates_view([gate], 3)
    assert view is not None
    assert (view["is_stopped"], view["last_good"]) == (True, "iter00")
    assert "2 of 3 iterations were not made. It drew black." in view["sentences"][0]


def test_features_of_a_guard_are_named_beside_it() -> None:
    row = {
        "iteration": 0,
        "policy": "iter00",
        "reward_accuracy": 0.7,
        "reward_accuracy_low": 0.6,
        "accuracy_change": None,
        "accuracy_change_low": None,
        "accuracy_change_high": None,
        "accuracy_change_p": None,
        "reward_accuracy_high": 0.8,
        "num_holdout_pairs": 200,
        "diversity": 0.2,
        "feature_diversity": 0.25,
        "features": "clipscore",
        "drift": 0.01,
        "moved_pixels": 0.1,
        "moved_features": 0.1,
        "held_out_logit": 1.0,
        "blank_share": 0.0,
        "truncated_share": 0.0,
        "rank_correlation": None,
        "best_beats_worst": None,
        "confident_share": None,
    }
    limits = Limits(
        min_reward_accuracy=0.5,
        max_confident_share=0.9,
        min_diversity_share=0.6,
        max_blank_share=0.01,
        max_truncated_share=0.05,
        max_drift=None,
        min_moved_share=0.02,
    )
    later = row | {"iteration": 1, "policy": "iter01", "feature_diversity": 0.1}
    view = guards_view([row, later], limits)
    (found,) = (row for row in view["guards"] if row["title"] == "Diversity of features")
    first, second = found["cells"]
    assert first == {"text": "0.250", "note": "", "turned": False}
    assert found["unit"] == "clipscore"
    assert (second["text"], second["turned"]) == ("0.100", True)
    assert found["line"] == {"text": "0.150", "label": "limit"}
    assert view["guard_iterations"] == [(0, "iter00"), (1, "iter01")]
    assert len(view["warnings"]) == 1
    assert "by features (clipscore) its images of one prompt differ 40 %" in view["warnings"][0]


@pytest.mark.parametrize(
    ("gain", "half_width", "direction", "words"),
    [
        (0.3, 0.1, "higher", "is higher than base on pickscore: +0.30 (95 % interval +0.20 to +0.40), 60 % of"),
        (0.75, 0.1, "higher", "1.5 times what keeping the better of two images gives; it wins 60 %"),
        (0.02, 0.01, "small", "hardly differs from base on pickscore: +0.020 (95 % interval +0.010"),
        (0.0, 0.04, "small", "0 % of what keeping the better of two images gives"),
        (0.02, 0.04, "unclear", "No clear difference between iter00 and base"),
        (-0.3, 0.1, "lower", "60 % of what keeping the better of two images gives"),
    ],
)  # fmt: skip
def test_a_verdict_tells_size_beside_sign(
    gain: float, half_width: float, direction: str, words: str
) -> None:
    ends = {"ci_low": gain - half_width, "ci_high": gain + half_width, "better_of_two": 0.5}
    found = Evaluation([comparison("iter00", 20 + gain, "base", 20.0, **ends)], ["base", "iter00"])
    row = found.against("pickapic", "pickscore", "iter00", "base")
    assert row is not None
    said = verdict(row, found.decimals("pickapic", "pickscore"))
    assert said.direction == direction
    assert words in said.sentence


def test_with_one_image_a_prompt_a_verdict_tells_no_size() -> None:
    row = evaluation(20.0, 20.3, better_of_two=None).against(
        "pickapic", "pickscore", "iter00", "base"
    )
    assert row is not None
    assert "better of two" not in verdict(row, 2).sentence


def test_a_policy_that_hardly_moved_says_so_in_the_first_line() -> None:
    found = evaluation(20.0, 20.3)
    first = headline(found, "pickapic", "pickscore", None, {"iter00": "iter00 hardly moved."})
    assert first["overall"].sentence == "iter00 hardly moved."
    assert first["overall"].direction == "small"
    assert first["sentences"][0].startswith("iter00 is higher than base")
    other = headline(found, "pickapic", "pickscore", None, {"iter07": "iter07 hardly moved."})
    assert other["overall"].sentence.startswith("iter00 is higher than base")


def test_a_judges_weights_and_what_they_are_worth_are_shown() -> None:
    fitted = JudgeRecord(
        policy="digest", kind="calibrated", weights=(0.5, 1.5), log_odds=3.0, num_timesteps=1000,
        num_pairs=200, accuracy=0.71, accuracy_low=0.6, accuracy_high=0.8, plain_accuracy=0.63,
        log_loss=0.58, plain_log_loss=0.65,
    )  # fmt: skip
    unfitted = replace(fitted, plain_accuracy=None, log_loss=None, num_pairs=20)
    panels = judge_panels([("iter00", fitted), ("iter01", unfitted)])
    assert [panel.title for panel in panels] == ["Weights of iter00", "Weights of iter01"]
    assert "71 % of 200 held-out pairs right (with equal weights 63 %)" in panels[0].caption
    assert "log-loss 0.580 (0.650; a coin has 0.693)" in panels[0].caption
    assert panels[1].caption == "Too few pairs to fit; 71 % of 20 held-out pairs right."
    for text in (">0<", ">500<", "equal weights"):
        assert text in panels[0].svg, text
