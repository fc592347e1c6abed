"""Counts of a run from its config, and hours and bytes from them, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.core.plan.configuration import read_config
from stages.core.plan.costs import Rates, StepJudgeRates, clock_hours, count, disk_bytes, hours
from stages.core.plan.online_costs import OnlineRates, count_round
from stages.core.plan.shards import Shards, shards_of
from stages.core.preflight import host
from stages.core.preflight.findings import Findings
from stages.core.preflight.host import check_host_memory, held_bytes, memory_limit

ROOT = Path(__file__).resolve().parents[2]
RATES = Rates(
    sample_image=2.0,
    sample_candidate=2.0,
    score_draw=0.1,
    train_pair=0.5,
    encode_image=0.2,
    image_bytes=1000,
    candidate_bytes=1000,
    latents_bytes=100,
    policy_bytes=10_000,
    trained_bytes=30_000,
)


@pytest.fixture
def sd15() -> dict[str, Any]:
    """The paper's setting."""
    return dict(yaml.safe_load((ROOT / "config/sd15.yaml").read_text()))


def test_counts_of_the_papers_run(sd15: dict[str, Any]) -> None:
    counts = count(sd15, evaluation_prompts=500, labelled_pairs=900_000)
    assert counts.human_pairs == 51_000
    assert counts.candidates == 50_000 * 8
    assert counts.generated_pairs == 50_000
    assert counts.evaluation_images == 500 * 5  # base and iterations 0 to 3
    # one pass over 50K human pairs, then over 10K, 20K, 20K generated ones and a third more human
    assert counts.training_pairs == 50_000 + 13_333 + 2 * 26_667
    assert (counts.policies, counts.reward_draws) == (4, 10)


def test_an_adopted_policy_needs_no_seed_training(sd15: dict[str, Any]) -> None:
    sd15["train_seed"]["policy"] = "elsewhere"
    assert count(sd15, 0, 0).training_pairs == 13_333 + 2 * 26_667


def test_all_pairs_are_those_of_the_files_that_are_not_held_out(sd15: dict[str, Any]) -> None:
    sd15["preferences"]["num_pairs"] = None
    sd15["iterations"] = 0
    counts = count(sd15, 0, 851_293)
    assert counts.human_pairs == 851_293
    assert counts.training_pairs == 850_293


def test_two_single_likes_cost_what_a_pair_does(sd15: dict[str, Any]) -> None:
    sd15["iterations"] = 0
    sd15["mix_preferences"]["seed_fraction"] = 0
    sd15["preferences"] |= {"num_pairs": 401, "num_holdout": 50, "unpaired": True}
    counts = count(sd15, 0, 0)
    assert (counts.human_pairs, counts.training_pairs) == (201 + 50, 201)
    sd15["preferences"]["num_pairs"] = None  # all but 50 liked and 50 disliked ones
    assert count(sd15, 0, 1000).training_pairs == 450


def test_hours_and_bytes_of_hand_numbers(sd15: dict[str, Any]) -> None:
    sd15 |= {"iterations": 1}
    sd15["prompts"]["per_iteration"] = [9]
    sd15["preferences"] |= {"num_pairs": 6, "num_holdout": 2}
    counts = count(sd15, evaluation_prompts=4, labelled_pairs=0)
    found = hours(counts, RATES)
    assert found["sample candidates"] == pytest.approx(72 * 2.0 / 3600)
    assert found["score candidates"] == pytest.approx(72 * 10 * 0.1 / 3600)
    assert found["encode human pairs"] == pytest.approx(8 * 2 * 0.2 / 3600)
    assert found["train"] == pytest.approx((6 + 12) * 0.5 / 3600)
    assert found["sample evaluation images"] == pytest.approx(4 * 3 * 2.0 / 3600)
    sizes = disk_bytes(counts, RATES)
    assert sizes["candidates"] == 72 * 1100
    smaller = disk_bytes(counts, replace(RATES, candidate_bytes=300))
    assert smaller["candidates"] == 72 * 400
    # 9 pairs, the same 9 in the mix, and a third as many human pairs beside them
    assert smaller["pairs and mixes"] == 9 * (2 * 2 * 400) + math.ceil(9 * 0.33 * 2 * 1100)
    assert sizes["policies"] == 2 * 10_000
    assert sizes["training state"] == 30_000


def test_a_trainings_files_are_those_of_the_largest_one(sd15: dict[str, Any]) -> None:
    sd15 |= {"iterations": 2, "held_out_curve": {"num_pairs": 64}}
    sd15["prompts"]["per_iteration"] = [9, 15]
    sd15["preferences"] |= {"num_pairs": 6, "num_holdout": 2}
    counts = count(sd15, 0, 0)
    assert counts.candidates_of_an_iteration == 15 * 8
    # 15 generated pairs, a quarter of the mix human: 5; and both held-out pairs
    assert counts.pairs_of_a_training == 15 + 5 + 2
    sizes = disk_bytes(counts, replace(RATES, caption_bytes=7))
    assert sizes["a training's encoded pairs"] == 22 * (2 * 100 + 7)
    sd15["preferences"]["num_pairs"] = 100  # more than any mix
    assert count(sd15, 0, 0).pairs_of_a_training == 102
    sd15["train_seed"]["policy"] = "elsewhere"
    assert count(sd15, 0, 0).pairs_of_a_training == 15 + 5 + 2


def test_memory_of_the_machine_by_hand(sd15: dict[str, Any]) -> None:
    sd15["prompts"]["per_iteration"] = [100]
    sd15["sample_candidates"]["shards"] = 3
    sd15["iterations"] = 1
    sd15["execution"] = {"training_gpus": 4, "jobs_per_gpu": 2}
    counts = count(sd15, 0, 0)
    held = held_bytes(counts, RATES, sd15, 5_000, devices=8)
    # every process of a training may read the whole state
    assert held["training"] == 4 * (5_000 + 30_000)
    # 800 images in three shards, the largest of 267
    assert held["scoring"] == 8 * 2 * (5_000 + 267 * 100)
    sd15["score_candidates"]["reencode"] = True  # then it holds image files
    assert held_bytes(counts, RATES, sd15, 5_000, devices=1)["scoring"] == 2 * (5_000 + 267 * 1000)


def test_memory_is_limited_by_the_group_of_the_process(tmp_path: Path) -> None:
    limit, none = tmp_path / "memory.max", tmp_path / "none"
    limit.write_text("max\n")
    machine = memory_limit((str(limit), str(none)))
    assert machine > 2**28
    limit.write_text(f"{2**28}\n")
    assert memory_limit((str(limit), str(none))) == 2**28
    limit.write_text(f"{2 * machine}\n")
    assert memory_limit((str(limit), str(none))) == machine


def test_a_machine_without_the_memory_fails(
    sd15: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sd15["execution"] = {"training_gpus": 1, "jobs_per_gpu": 1}
    findings = Findings()
    check_host_memory(count(sd15, 0, 0), RATES, sd15, findings, devices=1)
    assert findings.failed == []
    monkeypatch.setattr(host, "memory_limit", lambda: 1000)
    check_host_memory(count(sd15, 0, 0), RATES, sd15, findings, devices=1)
    assert findings.failed == ["host memory, training", "host memory, scoring"]


def test_exports_are_counted_by_what_they_write(sd15: dict[str, Any]) -> None:
    sd15 |= {
        "iterations": 1,
        "export": {
            "policies": ["diffusers", "single-file", "lora-kohya"],
            "preferences": ["pickapic", "webdataset"],
        },
    }
    sd15["prompts"]["per_iteration"] = [9]
    rates = replace(RATES, denoiser_bytes=2000, others_bytes=300)
    # two policies, and 12 pairs in two layouts; a full fine-tune's folder is linked
    pairs = 2 * 12 * 2 * 1000
    full = disk_bytes(count(sd15, 0, 0), rates)["exports"]
    assert full == 2 * (2000 + 300) + pairs
    sd15["lora"] = {"rank": 4}
    lora = disk_bytes(count(sd15, 0, 0), rates)["exports"]
    assert lora == 2 * (2 * 2000 + 300 + 10_000) + pairs
    sd15["export"] = {"policies": [], "preferences": []}
    assert disk_bytes(count(sd15, 0, 0), rates)["exports"] == 0


def test_more_devices_shorten_what_is_spread_over_them() -> None:
    taken = {"sample candidates": 16.0, "train": 4.0}
    assert clock_hours(taken, devices=1, training_gpus=1, encoding_shards=1) == 20.0
    assert clock_hours(taken, devices=8, training_gpus=1, encoding_shards=1) == 2.0 + 4.0
    assert clock_hours(taken, devices=8, training_gpus=4, encoding_shards=1) == 2.0 + 1.0
    assert (
        clock_hours(taken, devices=2, training_gpus=4, encoding_shards=1) == 8.0 + 2.0
    )  # no more than there are


def test_encoding_is_spread_over_its_shards_alone() -> None:
    taken = {"encode human pairs": 8.0, "sample candidates": 16.0}
    for shards, expected in ((1, 8.0), (4, 2.0), (100, 1.0)):
        found = clock_hours(taken, devices=8, training_gpus=1, encoding_shards=shards)
        assert found == expected + 2.0


def test_the_length_of_jobs_by_hand(sd15: dict[str, Any]) -> None:
    """An image takes 2 s to sample, and 10 draws of 0.1 s to score."""
    counts = count(sd15, evaluation_prompts=500, labelled_pairs=900_000)
    found = {each.key: each for each in shards_of(sd15, counts, RATES)}
    sampling = found["sample_candidates.shards"]
    prompts = max(sd15["prompts"]["per_iteration"])
    assert (sampling.number, sampling.seconds) == (32, prompts * 8 * 2.0)
    assert sampling.minutes == pytest.approx(prompts * 8 * 2.0 / 32 / 60)
    encoding = found["preferences.shards"]
    assert (encoding.number, encoding.seconds) == (8, 2 * 50_000 * 0.2)
    one = Shards(key="k", number=4, seconds=4 * 90.0)
    assert one.share_of_starts(10.0) == 0.1
    lengths = (1.0, 2.0, 3.0, 6.0, 20.0)
    assert [one.fitting(each, devices=1, start=10.0) for each in lengths] == [6, 3, 2, 1, 1]
    assert [one.fitting(each, devices=4, start=10.0) for each in lengths] == [8, 4, 4, 4, 4]
    # A start of 10.1 s is more than a tenth of what a fourth of the work takes with it.
    assert [one.fitting(each, devices=4, start=10.1) for each in lengths] == [8, 4, 4, 1, 1]


def test_scoring_decides_where_it_takes_longer(sd15: dict[str, Any]) -> None:
    counts = count(sd15, evaluation_prompts=500, labelled_pairs=900_000)
    slow = replace(RATES, score_draw=1.0)  # 10 draws an image
    sampling = shards_of(sd15, counts, slow)[0]
    assert sampling.seconds == counts.candidates_of_an_iteration * 10.0


def test_an_online_training_is_counted_by_hand() -> None:
    config = read_config(ROOT / "config/sd15.yaml", ROOT / "config/overlays/spo.yaml")
    counts = count(config, 500, 900_000)
    # base, iteration 0 and the online policy; of the last two a policy each
    assert (counts.evaluation_images, counts.policies) == (500 * 3, 2)
    spo = counts.online_round
    assert spo is not None
    assert counts.online_rounds == 1000
    # 40 prompts: alone to step 4, then pools of 4 at steps 5 to 19; compared after each of steps 4 to 19
    assert spo.chain_steps == 40 * (5 + 4 * 15)
    assert (spo.judged, spo.judge_draws) == (40 * 4 * 16, 0)
    assert spo.trained_steps == spo.compared_steps == 40 * 16 * 2
    assert spo.kept_latents == 2 * 40 * 16 * 2
    assert spo.calls == 2 * (2600 + 1280 + 1280)
    rates = replace(RATES, online=OnlineRates(chain_step=1.0, decode_image=0.5, trained_step=3.0))
    taken = hours(counts, rates)
    assert taken["online: sample"] == pytest.approx(1000 * 2600 / 3600)
    assert taken["online: judge"] == pytest.approx(1000 * 2560 * 0.5 / 3600)
    assert taken["online: train"] == pytest.approx(1000 * 1280 * 3 / 3600)
    others = {name: value for name, value in taken.items() if not name.startswith("online")}
    both = [
        clock_hours(each, devices=8, training_gpus=4, encoding_shards=1) for each in (taken, others)
    ]
    assert both[0] - both[1] == pytest.approx((sum(taken.values()) - sum(others.values())) / 4)
    config["execution"]["training_gpus"] = 4
    held = held_bytes(counts, RATES, config, 5_000, devices=8)
    assert held["online training"] - held["training"] == 4 * 2 * 2560 * 100


def test_a_judge_in_latent_space_is_scored_and_not_decoded() -> None:
    config = read_config(ROOT / "config/sd15.yaml", ROOT / "config/overlays/spo.yaml")
    config["online"] |= {"judge": "self", "judge_draws": 3, "inner_steps": 3}
    counts = count(config, 500, 900_000)
    assert counts.online_round is not None
    # compared after steps 6, 9, 12, 15, 18 and the last
    assert counts.online_round.judged == 40 * 4 * 6
    assert counts.online_round.judge_draws == 40 * 4 * 6 * 3
    assert counts.online_round.calls == 2 * (2600 + 1280 + 1280) + 2 * 2880
    rates = replace(RATES, online=OnlineRates(chain_step=1.0, decode_image=0.5, trained_step=3.0))
    assert hours(counts, rates)["online: judge"] == pytest.approx(1000 * 2880 * 0.1 / 3600)


def test_the_training_of_a_step_judge_is_counted_by_hand() -> None:
    config = read_config(ROOT / "config/sd15.yaml", ROOT / "config/overlays/spo.yaml")
    assert count(config, 500, 900_000).step_judge_pairs == 0
    config["step_judge"] |= {"clip": "a", "num_steps": 8000, "batch_pairs": 64}
    counts = count(config, 500, 900_000)
    judge = StepJudgeRates(train_pair=0.25, weight_bytes=4_000, trained_bytes=12_000)
    rates = replace(RATES, step_judge=judge)
    assert hours(counts, rates)["train the step judge"] == pytest.approx(8000 * 64 * 0.25 / 3600)
    # It has the devices of a training, not all.
    alone = {"train the step judge": 8.0}
    assert clock_hours(alone, devices=8, training_gpus=4, encoding_shards=1) == 2.0
    written = disk_bytes(counts, rates)
    assert (written["step judge"], written["training state"]) == (4_000, 30_000)
    larger = replace(rates, step_judge=replace(judge, trained_bytes=50_000))
    assert disk_bytes(counts, larger)["training state"] == 50_000  # one training at a time
    assert "step judge" not in disk_bytes(counts, RATES)


def test_whole_chains_are_counted_by_hand() -> None:
    config = read_config(ROOT / "config/sd15.yaml", ROOT / "config/overlays/ddpo.yaml")
    ddpo = count_round(config["online"], judge="compressibility", judge_draws=4)
    assert (ddpo.chain_steps, ddpo.judged) == (256 * 50, 256)
    assert (ddpo.trained_steps, ddpo.compared_steps) == (256 * 50, 0)
    d3po = config["online"] | {
        "method": "d3po", "candidates_per_prompt": 2, "passes": 3, "guidance_scale": 1.0,
    }  # fmt: skip
    found = count_round(d3po, judge="compressibility", judge_draws=4)
    guided = {**d3po, "guidance_scale": 3.5}
    rows = [
        count_round(guided, judge="total", judge_draws=4, is_told_guidance=told).rows
        for told in (False, True)
    ]
    assert rows == [2, 1]
    assert (found.chain_steps, found.judged) == (256 * 2 * 50, 512)
    assert found.trained_steps == found.compared_steps == 3 * 256 * 2 * 50
    assert found.kept_latents == 2 * 256 * 2 * 50
    assert found.calls == found.chain_steps + 2 * found.trained_steps
