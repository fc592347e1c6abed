"""What the report chooses to show and how it says it: by hand, on rows made up for it."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.core.artifacts.timings import TimedJob, Timings, read_timings
from stages.core.evaluation.gates import Gate
from stages.core.evaluation.guards import GUARDS_TABLE, Limits
from stages.core.evaluation.verdicts import Evaluation
from stages.core.report.advice import advise, judge_trend
from stages.core.report.changes import most_changed
from stages.core.report.data_words import data_sentences
from stages.core.report.guard_rows import guards_view, split_shared
from stages.core.report.looks import MOST_PICTURES, policies_look
from stages.core.report.metric_words import METRICS
from stages.core.report.pairs import (
    chance,
    choose_shown,
    millionths,
    most_wrong,
    pair_look,
    scores_are_rewards,
    wrong_notes,
)
from stages.core.report.picture_tables import evenly_spaced
from stages.core.report.run_facts import code_in_words, run_facts, time_facts
from stages.core.report.thumbnails import PAGE_BYTES, SIDES, bytes_each, thumbnail
from stages.metrics import NETWORKS, SCORERS
from tests.builders import encoded
from tests.core.test_page import comparison

Row = dict[str, Any]


# Gains and losses


def test_what_gained_and_lost_most_comes_first_with_its_own_image() -> None:
    before = {
        "up": {0: 1.0, 1: 2.0}, "more": {0: 1.0, 1: 1.0}, "down": {0: 3.0, 1: 1.0},
        "same": {0: 1.0}, "alone": {0: 1.0},
    }  # fmt: skip
    after = {
        "up": {0: 1.1, 1: 2.5}, "more": {0: 3.0, 1: 0.9}, "down": {0: 2.9, 1: 0.2},
        "same": {0: 1.0}, "other": {0: 9.0},
    }  # fmt: skip
    gained, lost = most_changed(before, after, 4)
    assert [(c.prompt_id, c.candidate) for c in gained] == [("more", 0), ("up", 1)]
    assert [(c.prompt_id, c.candidate) for c in lost] == [("down", 1)]
    assert gained[0].mean == pytest.approx(0.95)
    assert lost[0].in_words(1) == [
        "−0.5 on average of 2 images",
        "image 0: 3.0 to 2.9",
        "image 1: 1.0 to 0.2",
    ]
    assert [c.prompt_id for c in most_changed(before, after, 1)[0]] == ["more"]
    assert most_changed(after, before, 4)[1][0].prompt_id == "more"


# Pairs


def pair(margin: float | None, error: float | None, **more: Any) -> Row:
    return {
        "pair_id": "p", "prompt": "a dog", "margin": margin, "margin_standard_error": error,
        "winner_score": margin, "loser_score": 0.0, "probability": 0.9, **more,
    }  # fmt: skip


def test_pairs_for_audit_have_the_smallest_margin_over_its_standard_error() -> None:
    # the largest margin is the noisiest: by margin alone it would be shown as the surest
    rows = [pair(100.0, 100.0), *(pair(float(m), 1.0) for m in range(2, 12)), pair(5.0, 10.0)]
    shown = choose_shown(rows, 4)
    assert shown[-2:] == [0, 11]  # 1 and 0.5 standard errors
    assert shown[0] == 10  # 11 standard errors
    assert len(set(shown)) == 4
    assert choose_shown(rows[:3], 4) == [2, 1, 0]


def test_pairs_without_standard_errors_go_by_margin_and_without_margins_by_score() -> None:
    rows = [pair(2.0, None), pair(3.0, None), pair(1.0, None)]
    assert choose_shown(rows, 6) == [1, 0, 2]
    rows = [pair(None, None, winner_score=score) for score in (2.0, 3.0, None)]
    assert choose_shown(rows, 6) == [1, 0, 2]


def test_rewards_have_one_unit_and_other_scores_their_own() -> None:
    reward = pair(0.00113, 0.000178, winner_score=0.00113, loser_score=0.0)
    metric = pair(0.00113, 0.000178, winner_score=21.5, loser_score=20.9)
    assert scores_are_rewards([reward])
    assert not scores_are_rewards([reward, metric])
    image = thumbnail(encoded(np.zeros((8, 8, 3), np.uint8), "PNG"), "a test")
    shown = pair_look(reward, (image, image), is_for_audit=True, are_rewards=True)
    assert [one.note for one in shown.pictures] == ["reward 1,130", "reward 0.0"]
    assert shown.notes[0] == "margin 1,130 ± 178 millionths, 6.3 standard errors"
    assert shown.mark == "for audit"
    shown = pair_look(metric, (image, image), is_for_audit=False, are_rewards=False)
    assert [one.note for one in shown.pictures] == ["score 21.5", "score 20.9"]
    assert (chance(0.001), chance(0.5), chance(1.0)) == ("below 0.01", "0.50", "above 0.99")
    assert (chance(None), millionths(0.0)) == ("–", "0.0")
    assert (millionths(-1.36e-06), millionths(None), millionths(float("nan"))) == ("−1.4", "–", "–")


def test_the_held_out_pairs_that_are_most_surely_wrong_come_first() -> None:
    def judged(name: str, gain: float, p: float) -> Row:
        return {"pair_id": name, "winner_reward": gain, "loser_reward": 0.0, "probability": p}

    rows = [judged("a", -1e-4, 0.3), judged("b", 1e-4, 0.7), judged("c", -3e-4, 0.1)]
    assert [row["pair_id"] for row in most_wrong(rows)] == ["c", "a"]
    notes = wrong_notes(rows[2], "iter03", {"c": judged("c", 2e-4, 0.8)}, "iter00")
    assert notes == [
        "iter03: p(chosen > other) 0.10, margin −300 millionths",
        "iter00 had it right: p 0.80",
    ]
    assert len(wrong_notes(rows[2], "iter00", {"c": rows[2]}, "iter00")) == 1


# Which policy to use


def guards(*accuracies: tuple[float, float | None, float | None, float | None]) -> list[Row]:
    """Rows of the guards table: accuracy, and its change with both ends of its interval."""
    rows = []
    for iteration, (accuracy, change, low, high) in enumerate(accuracies):
        row: Row = dict.fromkeys(GUARDS_TABLE.arrow.names)
        row |= {
            "iteration": iteration, "policy": f"iter{iteration:02d}", "reward_accuracy": accuracy,
            "reward_accuracy_low": accuracy - 0.05, "reward_accuracy_high": accuracy + 0.05,
            "num_holdout_pairs": 200, "accuracy_change": change, "accuracy_change_low": low,
            "accuracy_change_high": high, "accuracy_change_p": None if change is None else 0.003,
            "diversity": 0.2, "feature_diversity": 0.2, "features": "perceptual", "drift": 1e-5,
            "blank_share": 0.0, "truncated_share": 0.0, "moved_pixels": 0.1, "moved_features": 0.1,
            "held_out_logit": 1.0,
        }  # fmt: skip
        rows.append(row)
    return rows


STEADY = (0.7, 0.0, -0.05, 0.05)
FADED = (0.6, -0.1, -0.15, -0.05)
FIRST = (0.7, None, None, None)


def evaluated(*gains: float, between: tuple[Row, ...] = ()) -> Evaluation:
    """Policies iter00, iter01 ... that gain so much on base, with intervals 0.1 wide on each side."""
    names = [f"iter{place:02d}" for place in range(len(gains))]
    rows = [comparison("base", 20.0, "base", 20.0)]
    rows += [
        comparison(name, 20.0 + gain, "base", 20.0) for name, gain in zip(names, gains, strict=True)
    ]
    return Evaluation([*rows, *between], ["base", *names])


def advised(evaluation: Evaluation, rows: list[Row], *gates: Gate) -> tuple[str, str]:
    found = advise(evaluation, "pickapic", "pickscore", rows, Limits(), gates)
    return found.policy, found.reason


def test_the_last_policy_is_used_if_it_is_higher_and_nothing_warns() -> None:
    policy, reason = advised(evaluated(0.5, 0.6), guards(FIRST, STEADY))
    assert policy == "iter01"
    assert "clearly higher than base on pickscore, and no guard warns of it" in reason


def test_a_policy_that_a_guard_warns_of_is_passed_over_and_the_page_says_why() -> None:
    policy, reason = advised(evaluated(0.5, 0.6), guards(FIRST, FADED))
    assert policy == "iter00"
    assert "Passed over: the guards warn of iter01 (change of accuracy)." in reason
    policy, reason = advised(evaluated(0.5, 0.6), guards((0.5, None, None, None), FADED))
    assert policy == "base"
    assert reason.startswith("No policy is without a warning")


def test_an_earlier_policy_is_used_only_if_it_is_clearly_higher_than_the_last() -> None:
    rows = guards(FIRST, STEADY)
    lower = comparison("iter01", 20.3, "iter00", 20.6)
    assert advised(evaluated(0.6, 0.3, between=(lower,)), rows)[0] == "iter00"
    unclear = comparison("iter01", 20.55, "iter00", 20.6)
    assert advised(evaluated(0.6, 0.55, between=(unclear,)), rows)[0] == "iter01"


def test_base_is_kept_where_nothing_is_clearly_higher() -> None:
    policy, reason = advised(evaluated(0.05, -0.3), guards(FIRST, STEADY))
    assert (policy, reason) == ("base", "iter01 is not clearly higher than base.")
    assert advised(Evaluation([comparison("base", 1.0, "base", 1.0)], ["base"]), guards(FIRST)) == (
        "base", "No other policy was evaluated.",
    )  # fmt: skip


def test_a_policy_that_hardly_moved_is_not_the_one_to_use() -> None:
    rows = guards(FIRST, STEADY)
    rows[1] |= {"moved_pixels": 1e-6, "moved_features": 1e-6, "held_out_logit": 1e-6}
    policy, reason = advised(evaluated(0.5, 0.6), rows)
    assert policy == "iter00"
    assert "iter01 hardly moved from base" in reason
    rows = guards((0.5, None, None, None), STEADY)  # as a judge at chance, and hardly moved
    rows[0] |= {"moved_pixels": 1e-6, "moved_features": 1e-6, "held_out_logit": 1e-6}
    assert "iter00 hardly moved from base" in advised(evaluated(0.5, 0.6), rows)[1]


def test_where_the_guards_decided_their_policy_is_used() -> None:
    gates = [
        Gate(
            iteration=place, policy=f"iter0{place}", on_collapse="rollback", limits={},
            findings=(("x",) if place else ()), go_on_from="iter00", last_good="iter00",
        )
        for place in range(2)
    ]  # fmt: skip
    assert advised(evaluated(0.5, 0.6), guards(FIRST, STEADY), *gates)[0] == "iter00"


def test_the_judges_trend_is_told_by_its_paired_test() -> None:
    found = judge_trend(guards(FIRST, STEADY, FADED))
    assert found is not None
    assert (found.direction, found.label) == ("lower", "The judge fades")
    assert found.sentence == (
        "iter02 ranks 60 % of 200 held-out pairs as people do, iter00 70 %: −10 points on the same "
        "pairs (95 % interval −15 to −5; exact paired test p = 0.003)."
    )
    rows = guards(FIRST, FADED)
    rows[1]["accuracy_change_p"] = 0.2
    unclear = judge_trend(rows)
    assert unclear is not None
    assert unclear.direction == "unclear"
    assert judge_trend(guards(FIRST)) is None


def test_guards_have_one_notation_each() -> None:
    rows = guards(FIRST, FADED)
    rows[1] |= {"drift": 3.21e-5}
    found = {row["title"]: row for row in guards_view(rows, Limits())["guards"]}
    drift, change = found["Drift"], found["Change of accuracy"]
    assert (drift["unit"], [cell["text"] for cell in drift["cells"]]) == (
        "× 10⁻⁵",
        ["1.00", "3.21"],
    )
    assert (change["unit"], [cell["text"] for cell in change["cells"]]) == ("points", ["–", "−10"])
    assert change["cells"][1] == {"text": "−10", "note": "−15 to −5 points", "turned": True}
    assert change["line"] == {"text": "0", "label": "iteration 0"}
    for row in found.values():
        texts = [str(row["line"]), *(cell["text"] for cell in row["cells"])]
        assert not any("e-" in text or "e−" in text for text in texts), row["title"]


# What was run


def test_what_all_notes_of_a_guard_end_in_is_said_once() -> None:
    assert split_shared(["61 to 75 %, n = 200", "60 to 74 %, n = 200"]) == (
        ["61 to 75 %", "60 to 74 %"], "n = 200",
    )  # fmt: skip
    assert split_shared(["", "perceptual", "perceptual"]) == (["", "", ""], "perceptual")
    assert split_shared(["1, n = 2", "1, n = 3"]) == (["1, n = 2", "1, n = 3"], "")
    assert split_shared(["alone"]) == (["alone"], "")


def timed(stage: str, seconds: float, ended: float = 1e9, *, has_gpu: bool = True) -> TimedJob:
    return TimedJob(stage=stage, seconds=float(seconds), ended=ended, has_gpu=has_gpu)


def test_device_hours_count_each_gpu_of_a_training() -> None:
    noon = datetime(2026, 11, 27, 12, tzinfo=UTC).timestamp()
    jobs = [timed("sample_candidates", 60, noon), timed("update_policy", 3600, noon + 3600)]
    made, time = time_facts(jobs, training_gpus=4)
    assert made.value == "2026-11-27 11:59 to 13:00 UTC (61 min)"
    assert time.name == "Time on GPUs"
    assert time.value == "4.0 h in 2 timed jobs: sample_candidates 60 s, update_policy 4.0 h"
    assert made.is_of_time
    assert time.is_of_time
    mixed = time_facts([*jobs, timed("score_candidates", 1, has_gpu=False)], 1)
    assert mixed[1].name == "Time on devices"
    assert time_facts([], 1) == []


def table(folder: Path, name: str, text: str, log: str = "") -> Path:
    path = folder / f"{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.with_suffix(".log").write_text(log)
    return path


def test_timing_tables_are_read_with_the_device_of_their_log(tmp_path: Path) -> None:
    head = "s\th:m:s\tmax_rss\n"
    first = table(
        tmp_path, "iter01/sample_candidates-3", f"{head}12.5\t0:00:12\t7\n",
        "x: done, 1 rows in, 1 rows out, 12.0 s, peak memory 1.00 GB, GPU 3.10 GB\n",
    )  # fmt: skip
    second = table(tmp_path, "iter00/train_seed", f"{head}2\t0:00:02\t7\n", "peak memory 1.00 GB\n")
    os.utime(first, (200, 200))
    os.utime(second, (100, 100))
    bad = [
        table(tmp_path, f"bad{place}", text)
        for place, text in enumerate(
            ("", head, f"{head}-\t-\t-\n", "x\ty\n1\t2\n", f"{head}nan\t\t\n")
        )
    ]
    found = read_timings(tmp_path)
    assert found.jobs == [
        timed("train_seed", 2.0, 100.0, has_gpu=False),
        timed("sample_candidates", 12.5, 200.0),
    ]
    assert found.unreadable == sorted(bad)
    assert read_timings(tmp_path / "absent") == Timings(jobs=[], unreadable=[])


def test_the_head_leaves_out_what_is_not_known() -> None:
    nothing = run_facts(
        config={}, counts={}, sizes=[], evaluated="", timings=Timings(jobs=[], unreadable=[]),
        training_gpus=1, made_with={},
    )  # fmt: skip
    assert nothing == []
    sizes = [{"num_pairs": 192, "num_candidates": 8}, {"num_pairs": 192, "num_candidates": 8}]
    facts = run_facts(
        config={"model": {"base": "sd15"}, "lora": {"rank": 8}},
        counts={"pairs_kept": 1512, "pairs_held_out": 200},
        sizes=sizes,
        evaluated="100 prompts",
        timings=Timings(jobs=[], unreadable=[]),
        training_gpus=1,
        made_with={"commit": "0123456789ab", "versions": {"torch": "2.13.0"}},
    )
    assert {fact.name: fact.value for fact in facts} == {
        "Model": "sd15, LoRA of rank 8",
        "Human pairs": "1,512 trained on, 200 held out",
        "Iterations": "2 of 192 pairs, of 8 candidates a prompt",
        "Evaluated on": "100 prompts",
        "Code": "commit 0123456789ab, torch 2.13.0",
    }
    assert code_in_words({"commit": None, "versions": None}) == ""


def test_every_metric_of_ours_is_explained() -> None:
    assert set(METRICS) == {*SCORERS, *NETWORKS}


# The data in words


def test_an_import_is_told_in_sentences_without_what_is_zero() -> None:
    told = data_sentences(
        {
            "layout": "pickapic", "num_files": 1, "rows_read": 1780, "pairs_kept": 512,
            "pairs_held_out": 200, "prompts_kept": 183, "prompts_held_out": 69, "ties_dropped": 42,
            "unlabelled_dropped": 0, "bad_rows": [], "bad_rows_dropped": 0, "files_not_read": [],
            "near_duplicate_images": 41, "near_duplicate_pairs_examples": [], "votes": {},
            "resolutions": {"64x64": 1424, "96x64": 3, "8x8": 2, "9x9": 1, "7x7": 1},
            "long_captions": {"captions_cut": 0, "examples": [], "tokens_read": 24},
        }
    )  # fmt: skip
    assert told == [
        "1,780 labelled rows of 1 file were read (layout pickapic).",
        "512 pairs of 183 prompts are trained on, 200 pairs of 69 prompts are held out.",
        "Left out: 42 ties.",
        "Noticed: 41 images that look almost like another one.",
        "Images by pixels: 1,424 of 64 x 64, 3 of 96 x 64, 2 of 8 x 8, 2 of other sizes.",
        "No caption is longer than the 24 tokens that the text encoder reads.",
    ]
    assert not any(mark in " ".join(told) for mark in "[]{}'")


def test_an_import_of_single_likes_is_told_by_images() -> None:
    told = data_sentences(
        {
            "layout": "likes", "num_files": 1, "rows_read": 1200, "images_kept": 1000,
            "liked_kept": 800, "disliked_kept": 200, "pairs_held_out": 50, "prompts_kept": 900,
            "prompts_held_out": 90, "repeated_labels": 3, "contradictory_labels": 1,
            "images_in_other_sets_dropped": 2, "images_left_over": 0, "images_beyond_cap": 4,
        }
    )  # fmt: skip
    assert told == [
        "1,200 labelled rows of 1 file were read (layout likes).",
        "800 liked and 200 disliked images of 900 prompts are trained on, 50 of each of 90 prompts are held out.",
        "Left out: 2 images whose prompt is one of the evaluation's.",
        "Noticed: 4 images beyond the most that one prompt may have, 3 labels of an image that had one "
        "already, 1 images that were both liked and disliked.",
    ]


def test_what_went_wrong_in_an_import_has_examples() -> None:
    rows = [{"file": "a.csv", "row": place, "why": "no image"} for place in range(5)]
    told = " ".join(
        data_sentences(
            {
                "bad_rows": rows, "files_not_read": ["x.txt"], "votes": {"2 to 1": 3},
                "long_captions": {"captions_cut": 1, "examples": ["a very"], "tokens_read": 77},
            }
        )
    )  # fmt: skip
    assert "file a.csv, row 2, why no image, and 2 more." in told
    assert "Files that were not read: x.txt." in told
    assert "Votes: pairs decided 3 by 2 to 1." in told
    assert "1 caption is longer than the 77 tokens" in told
    assert "“a very”" in told


# Pictures


def test_prompts_are_spread_from_the_first_to_the_last() -> None:
    names = [str(place) for place in range(100)]
    assert evenly_spaced(names, 4) == ["0", "33", "66", "99"]
    assert evenly_spaced(names[:3], 4) == ["0", "1", "2"]
    assert evenly_spaced(names, 1) == ["0"]


def test_a_picture_is_shrunk_until_it_fits_its_share_of_the_page() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 600, 3), np.uint8)
    data = encoded(noise, "PNG")
    large, small = thumbnail(data, "x", 10**9), thumbnail(data, "x", 60_000)
    assert (large.width, large.height) == (341, 512)
    assert len(small.uri) <= 60_000 < len(large.uri)
    assert max(small.width, small.height) in SIDES
    for num in (1, 150, 1000):
        assert bytes_each(num) * num <= PAGE_BYTES


def test_more_policies_than_the_style_sheet_knows_lose_those_between() -> None:
    image = thumbnail(encoded(np.zeros((8, 8, 3), np.uint8), "PNG"), "a test")
    names = ["base", *(f"iter{place:02d}" for place in range(40))]
    shown = policies_look("x", names, [image] * len(names), ("base", "iter39"))
    assert len(shown.pictures) == MOST_PICTURES
    assert shown.pictures[0].label == "base"
    assert shown.pictures[-1].label == "iter39"
    assert [one.label for one in shown.pictures if not one.is_extra] == ["base", "iter39"]
