"""train_online: what it writes, that it survives interruptions, that two processes do as one, what it refuses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from stages import export_policy, select_prompts, train_online, train_seed
from stages.core.artifacts.provenance import ArtifactError, policy_digest
from stages.core.errors import UserError
from stages.core.execution.stopping import STOP, Stopped
from stages.core.models.adapter import DiffusionModel
from stages.core.models.loading import ModelError
from stages.core.models.policy import Policy
from stages.core.plan.online_costs import count_round
from stages.core.training.held_out import HeldOut, HeldOutFiles, Progress
from stages.core.training.loop import TrainingError
from stages.core.training.online.judges import ImageJudge
from stages.core.training.online.settings import JudgeSettings, OnlineSettings
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution
from tests import flow_models
from tests.builders import FULL, LORA, read_rows, settings
from tests.failing_model import Interrupted
from tests.stages.test_processes import words

ROOT = Path(__file__).resolve().parents[2]

SPO = OnlineSettings(
    method="spo",
    rounds=3,
    prompts_per_update=2,
    candidates_per_prompt=2,
    num_inference_steps=3,
    guidance_scale=3.0,
    learning_rate=1e-3,
    batch_transitions=3,
    ratio_clip=0.1,
    divert_step=1,
)
DDPO = replace(
    SPO, method="ddpo", batch_transitions=6, ratio_clip=1e-4, prompt_buffer=4, prompt_min_count=3
)
D3PO = replace(SPO, method="d3po", preference_beta=0.1)

Make = Callable[..., train_online.Args]


@pytest.fixture
def make(
    prompts: select_prompts.Args, held_out: HeldOutFiles, tiny_base: str, tmp_path: Path
) -> Make:
    """The arguments of a small training in a folder of its own."""

    def args(name: str, online: OnlineSettings = SPO, **changes: Any) -> train_online.Args:
        folder = tmp_path / name
        plain = train_online.Args(
            prompts=prompts.output,
            model=settings(tiny_base),
            lora=LORA,
            settings=online,
            judge=JudgeSettings(name="sharpness"),
            held_out=held_out,
            seed=0,
            output=folder / "policy",
            training=folder / "training.parquet",
            transitions=folder / "transitions.parquet",
            held_out_curve=folder / "held_out_curve.parquet",
            work=folder / "work",
            threads=1,
        )
        return replace(plain, **changes)

    return args


def without_speed(path: Path) -> list[dict[str, Any]]:
    speeds = ("transitions_per_second", "sampling_seconds")
    return [{k: v for k, v in row.items() if k not in speeds} for row in read_rows(path)]


def tables(args: train_online.Args) -> list[list[dict[str, Any]]]:
    return [without_speed(p) for p in (args.training, args.transitions, args.held_out_curve)]


def test_spo_writes_a_policy_its_steps_and_every_comparison(
    make: Make, model: DiffusionModel
) -> None:
    args = make("spo")
    train_online.main(args)
    manifest = json.loads((args.output / "manifest.json").read_text())
    assert (manifest["kind"], manifest["method"], manifest["num_rounds"]) == ("lora", "spo", 3)
    rows, steps = read_rows(args.transitions), read_rows(args.training)
    assert len(rows) == 3 * 2 * 2  # rounds, prompts, steps 1 and 2
    assert [row["round"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    for row in rows:
        scores = row["scores"]
        assert len(scores) == 2
        assert (row["winner_candidate"], row["loser_candidate"]) == (
            int(np.argmax(scores)), int(np.argmin(scores)),
        )  # fmt: skip
        assert row["is_valid"] == (max(scores) > min(scores))
        assert row["timestep"] == {1: 334, 2: 1}[row["inference_step"]]
    trained = sum(row["is_valid"] for row in rows)
    assert sum(step["num_transitions"] for step in steps) == trained
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert not args.work.exists()
    assert model.load_denoiser(Policy(args.output)).adapter == "policy"
    weights = load_file(args.output / "pytorch_lora_weights.safetensors")
    assert any(float(value.abs().max()) > 0 for name, value in weights.items() if "lora_B" in name)
    assert read_rows(args.held_out_curve)[0]["step"] == 0


def test_ddpos_first_step_of_a_round_has_ratio_1_and_advantages_are_those_of_the_table(
    make: Make,
) -> None:
    args = make("ddpo", replace(DDPO, prompts_per_update=4), lora=FULL)
    train_online.main(args)
    rows, steps = read_rows(args.transitions), read_rows(args.training)
    assert len(rows) == 3 * 4 * 2 * 3
    assert [step["num_transitions"] for step in steps] == [6] * 12
    for first in steps[::4]:
        assert first["clipped_share"] == 0
        assert abs(first["log_ratio"]) < 1e-6
    known: dict[str, list[float]] = {}
    for number in (1, 2, 3):
        images = [r for r in rows if r["round"] == number and r["inference_step"] == 0]
        everything = [row["scores"][0] for row in images]
        for row in images:
            known.setdefault(row["prompt_id"], []).append(row["scores"][0])
        for row in images:
            own = known[row["prompt_id"]][-4:]
            base = own if len(own) >= 3 else everything
            expected = (row["scores"][0] - np.mean(base)) / (np.std(base) + 1e-6)
            assert row["advantage"] == pytest.approx(np.clip(expected, -5, 5), rel=1e-4, abs=1e-4)
    assert read_rows(args.training)[0]["implicit_accuracy"] is None
    assert json.loads((args.output / "manifest.json").read_text())["kind"] == "full"


def test_d3po_trains_on_every_step_of_the_best_and_the_worst_chain(make: Make) -> None:
    args = make("d3po", D3PO)
    train_online.main(args)
    rows = read_rows(args.transitions)
    assert [row["inference_step"] for row in rows] == [0, 1, 2] * 6
    assert read_rows(args.training)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(row["next_candidate"] is None for row in rows)


@pytest.mark.quick("online0", "online3")
@pytest.mark.parametrize(
    "online", [SPO, replace(SPO, inner_steps=2), replace(SPO, guidance_scale=1.0), DDPO, D3PO]
)
def test_the_plan_counts_the_rows_that_go_through_the_denoiser(
    make: Make, online: OnlineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, plain = [0], UNet2DConditionModel.forward

    def forward(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows[0] += len(sample)
        return plain(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    args = make("counted", online)
    train_online.main(replace(args, held_out=replace(args.held_out, num_pairs=0)))
    expected = count_round(asdict(online), judge="sharpness", judge_draws=4)
    assert rows[0] == online.rounds * expected.calls


def test_a_policy_judges_itself_without_decoding(
    make: Make, seed_trained: train_seed.Args, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageJudge, "__call__", None)
    judge = JudgeSettings(name="self", policy=str(seed_trained.output), num_draws=2)
    args = make("self", replace(SPO, rounds=1), judge=judge)
    train_online.main(args)
    rows = read_rows(args.transitions)
    assert all(np.ptp(row["scores"]) > 0 for row in rows)
    manifest = json.loads((args.output / "manifest.json").read_text())
    assert str(seed_trained.output / "manifest.json") in manifest["sail_inputs"]


def test_it_goes_on_from_a_policy_and_leaves_it_untouched(
    make: Make, seed_trained: train_seed.Args
) -> None:
    before = policy_digest(seed_trained.output)
    args = make("on", replace(SPO, rounds=1), lora=FULL, policy=str(seed_trained.output))
    train_online.main(args)
    assert policy_digest(seed_trained.output) == before != policy_digest(args.output)
    assert read_rows(args.training)[0]["loss"] != pytest.approx(math.log(2), abs=1e-9)


class Counted:
    """A judge's call after which the power goes, or SIGTERM comes."""

    def __init__(self, stop_at: int, what: Callable[[], None]) -> None:
        self.calls, self.stop_at, self.what = 0, stop_at, what
        self.call = ImageJudge.__call__

    def patched(self) -> Callable[..., Any]:
        def call(judge: ImageJudge, *words: Any, **more: Any) -> Any:
            self.calls += 1
            if self.calls == self.stop_at:
                self.what()
            return self.call(judge, *words, **more)

        return call


def cut() -> None:
    raise Interrupted


@pytest.mark.quick("spo, LoRA")
@pytest.mark.parametrize(
    ("online", "lora"), [(SPO, LORA), (DDPO, FULL)], ids=["spo, LoRA", "ddpo, full"]
)
def test_a_killed_training_continues_and_has_the_tables_and_weights_of_an_unbroken_one(
    make: Make, monkeypatch: pytest.MonkeyPatch, online: OnlineSettings, lora: Any
) -> None:
    unbroken, args = (
        make(name, online, lora=lora, execution=Execution(save_every=1))
        for name in ("unbroken", "broken")
    )
    train_online.main(unbroken)
    a_round = 2 if online.method == "spo" else 1
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ImageJudge, "__call__", Counted(2 * a_round + 1, cut).patched())
        train_online.main(args)
    assert not args.output.exists()
    assert (args.work / "state.json").is_file()
    again = Counted(-1, cut)
    with monkeypatch.context() as patch:
        patch.setattr(ImageJudge, "__call__", again.patched())
        train_online.main(args)
    assert again.calls == a_round  # only the last round was left
    assert tables(args) == tables(unbroken)
    assert policy_digest(args.output) == policy_digest(unbroken.output)


def test_a_training_that_is_asked_to_stop_saves_its_last_whole_round(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, args = make("unbroken"), make("stopped", prompts_per_batch=1)
    train_online.main(unbroken)
    monkeypatch.setattr(STOP, "is_asked", False)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="state of step 2 is saved"):
        patch.setattr(ImageJudge, "__call__", Counted(5, STOP.ask).patched())
        train_online.main(args)
    monkeypatch.setattr(STOP, "is_asked", False)
    train_online.main(args)
    assert [row["round"] for row in read_rows(args.training)] == [
        row["round"] for row in read_rows(unbroken.training)
    ]


def test_a_training_that_is_stopped_before_its_first_step_does_not_claim_a_state(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = make("early", prompts_per_batch=1)
    monkeypatch.setattr(STOP, "is_asked", False)
    monkeypatch.setattr(ImageJudge, "__call__", Counted(1, STOP.ask).patched())
    with pytest.raises(Stopped, match="nothing had been trained, so nothing is saved"):
        train_online.main(args)
    monkeypatch.setattr(STOP, "is_asked", False)
    assert not (args.work / "state.json").exists()


@pytest.mark.slow
def test_micro_batches_and_checkpointing_change_only_the_rounding(make: Make) -> None:
    plain = make("plain")
    small = make("small", execution=Execution(micro_batch_pairs=1, gradient_checkpointing=True))
    for args in (plain, small):
        train_online.main(args)
    for row, other in zip(
        without_speed(small.training), without_speed(plain.training), strict=True
    ):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_held_out_pairs_are_scored_in_batches_no_larger_than_a_micro_batch(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, score = [], HeldOut.score

    def seen(held_out: HeldOut, *words: Any, **more: Any) -> Progress:
        sizes.append(held_out.rows_per_batch)
        return score(held_out, *words, **more)

    monkeypatch.setattr(HeldOut, "score", seen)
    train_online.main(
        make("small", replace(SPO, rounds=1), execution=Execution(micro_batch_pairs=1))
    )
    assert sizes == [1, 1]


def test_trackers_are_sent_numbers_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, float]] = []
    monkeypatch.setattr(Processes, "track", lambda self, values, step: sent.append(values))
    train_online.main(make("tracked", replace(SPO, rounds=1)))
    curve = [values for values in sent if "held_out/accuracy" in values]
    assert [sorted(values) for values in curve] == [
        [f"held_out/{n}" for n in ("accuracy", "log_loss", "logit", "loser_error", "winner_error")]
    ]
    assert all(isinstance(value, int | float) for values in sent for value in values.values())


def test_the_card_of_its_policy_says_method_judge_rounds_and_where_it_began(
    make: Make, seed_trained: train_seed.Args, tiny_base: str, tmp_path: Path
) -> None:
    judge = JudgeSettings(name="self", policy=str(seed_trained.output), num_draws=1)
    args = make(
        "carded", replace(SPO, rounds=1), lora=FULL, policy=str(seed_trained.output), judge=judge
    )
    train_online.main(args)
    plain = make("plain", replace(SPO, rounds=1))
    train_online.main(plain)
    texts = {}
    for name, trained in (("carded", args), ("plain", plain)):
        out = tmp_path / f"{name}-exported"
        export_policy.main(
            export_policy.Args(
                policy=trained.output, model=settings(tiny_base), format="diffusers",
                dtype="float32", name=name, output=out,
            )
        )  # fmt: skip
        texts[name] = (out / "README.md").read_text()
    text = texts["carded"]
    assert "trained online by SPO, a baseline beside SAIL: in 1 rounds the policy" in text
    assert "the implicit reward of `iter00`, a policy that learnt from human pairs judged" in text
    assert "It began as the policy `iter00`." in text
    lines = [
        line for line in text.splitlines() if line.startswith("| 0 ") or "train_online" in line
    ]
    assert "| 0 | train_seed |" in lines[0]
    assert "| online | train_online |" in lines[1]
    assert lines[1].split(" | ")[3:6] == ["-", "-", "4"]  # its prompts
    assert "judges them itself" not in text
    assert str(tmp_path) not in text
    assert "the metric `sharpness` judged" in texts["plain"]
    assert "It began as" not in texts["plain"]
    assert "train_seed" not in texts["plain"]


def start(args: train_online.Args, processes: int) -> subprocess.Popen[str]:
    launcher = ["stages.launch", str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "stages.train_online", *words(asdict(args))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def kill_once_saved(process: subprocess.Popen[str], work: Path) -> None:
    """SIGKILL, as soon as a state lies in the work folder."""
    while not (work / "state.json").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize("online", [SPO, DDPO], ids=["spo", "ddpo"])
def test_two_processes_do_as_one(make: Make, online: OnlineSettings) -> None:
    alone, shared = make("alone", online), make("shared", online)
    train_online.main(alone)
    assert "training on 2 processes" in finish(start(shared, 2))
    for found, expected in zip(tables(shared), tables(alone), strict=True):
        assert len(found) == len(expected)
        for row, other in zip(found, expected, strict=True):
            for name, value in other.items():
                # A later round's images may differ by a grey level, and so its advantages by 0.2 %.
                close = 1e-3 if row.get("round") == 1 else 5e-3
                near = value if isinstance(value, str | None) else pytest.approx(value, close, 1e-3)
                assert row[name] == near, name
    policy_digest(shared.output)


@pytest.mark.slow
def test_a_training_killed_by_the_kernel_goes_on_to_the_same_end(make: Make) -> None:
    online = replace(SPO, rounds=6)
    unbroken, args = (
        make(name, online, execution=Execution(save_every=1)) for name in ("unbroken", "killed")
    )
    finish(start(unbroken, 1))
    kill_once_saved(start(args, 1), args.work)
    assert not args.output.exists()
    assert "continuing from step" in finish(start(args, 1))
    assert tables(args) == tables(unbroken)
    assert policy_digest(args.output) == policy_digest(unbroken.output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": replace(SPO, candidates_per_prompt=1)},
            "candidates_per_prompt is 1, but spo",
        ),
        ({"settings": replace(SPO, num_inference_steps=1000)}, r"is 1000, .* take 1 to 999"),
        ({"settings": replace(SPO, noise_level=0.0)}, "noise_level is 0.0; it must be above 0"),
        ({"judge": JudgeSettings(name="self")}, "judges by the policy 'base'"),
        ({"judge": JudgeSettings(name="tase")}, "there is no metric 'tase'"),
        ({"judge": JudgeSettings(name="pickscore")}, "needs metrics.pickscore.weights"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    make: Make, changes: dict[str, Any], message: str
) -> None:
    args = make("bad", **changes)
    with pytest.raises(UserError, match=message):
        train_online.main(args)
    assert not args.output.exists()


@pytest.mark.quick("sana", "flux")
@pytest.mark.parametrize(
    ("name", "online"), [("sd3", SPO), ("flux", DDPO), ("sana", SPO)], ids=["sd3", "flux", "sana"]
)
def test_a_model_of_flow_matching_is_trained_as_others_are(
    make: Make, tmp_path: Path, held_out: HeldOutFiles, online: OnlineSettings, name: str
) -> None:
    base = getattr(flow_models, name)(tmp_path / name)
    size = (64, 64) if name == "flux" else None
    args = make(
        "flow", replace(online, rounds=2, prompts_per_update=3), model=settings(base, image_size=size),
        held_out=replace(held_out, num_pairs=0),
    )  # fmt: skip
    train_online.main(args)
    rows, steps = read_rows(args.transitions), read_rows(args.training)
    shift = math.exp(flow_shift(base)) if name == "flux" else 3.0
    times = [1.0, 2 / 3, 1 / 3] if name == "flux" else None
    for row in rows:
        if times is not None:
            level = times[row["inference_step"]]
            expected = 1000 * shift * level / (1 + (shift - 1) * level)
            assert row["timestep"] == round(expected)
        assert 0 < row["timestep"] <= 1000
        assert np.isfinite(row["scores"]).all()
    if online.method == "ddpo":
        assert abs(steps[0]["log_ratio"]) < 1e-6
        assert steps[0]["clipped_share"] == 0
    else:
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    weights = load_file(args.output / "pytorch_lora_weights.safetensors")
    assert any(float(value.abs().max()) > 0 for key, value in weights.items() if "lora_B" in key)
    assert json.loads((args.output / "manifest.json").read_text())["method"] == online.method


def flow_shift(base: Path) -> float:
    """mu of FLUX.1's dynamic shift for 64 x 64 pixels, 16 patches: on the line through its two published ends."""
    kept = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    ends = [(kept[f"{end}_image_seq_len"], kept[f"{end}_shift"]) for end in ("base", "max")]
    (first, low), (last, high) = ends
    return float(low + (high - low) * (16 - first) / (last - first))


def test_a_judge_that_knows_no_flow_is_refused_before_anything_is_encoded(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_online, "read_prompts", None)
    args = make("flow", model=settings(flow_models.sana(tmp_path / "sana")))
    spm = replace(args, judge=JudgeSettings(name="spm"))
    with pytest.raises(ModelError, match="the judge is 'spm', .* models of sana have other times"):
        train_online.main(spm)


def test_the_final_policy_is_scored_also_after_a_last_round_without_a_clear_comparison(
    make: Make, monkeypatch: pytest.MonkeyPatch, held_out: HeldOutFiles
) -> None:
    args = make("late", replace(SPO, rounds=2), held_out=replace(held_out, every_steps=100))
    call, calls = ImageJudge.__call__, []

    def judged(judge: ImageJudge, *words: Any, **more: Any) -> Any:
        calls.append(1)
        scores = call(judge, *words, **more)
        return scores if len(calls) <= 2 else np.zeros_like(scores)  # two comparisons a round

    monkeypatch.setattr(ImageJudge, "__call__", judged)
    train_online.main(args)
    steps = read_rows(args.training)
    assert {row["round"] for row in steps} == {1}
    assert {row["round"] for row in read_rows(args.transitions)} == {1, 2}
    assert [row["step"] for row in read_rows(args.held_out_curve)] == [0, len(steps)]


def test_a_judge_that_prefers_nothing_clearly_trains_nothing_and_says_so(make: Make) -> None:
    args = make("flat", replace(SPO, min_preference_gap=0.999999, rounds=1))
    args = replace(args, judge=JudgeSettings(name="sharpness", scale=1e-3))
    with pytest.raises(TrainingError, match="nothing was trained: in none of 1 rounds"):
        train_online.main(args)
    assert not args.output.exists()


def test_a_policy_that_is_not_finished_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    with pytest.raises(ArtifactError, match=r"half is no finished policy"):
        train_online.main(make("half-way", policy=str(tmp_path / "half")))
