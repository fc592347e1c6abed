"""train_step_judge: it begins as CLIP, learns what people prefer, survives a kill, and judges train_online."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from transformers import CLIPModel

from stages import (
    encode_preferences,
    import_preferences,
    preflight,
    select_prompts,
    train_online,
    train_step_judge,
)
from stages.core.artifacts.images import to_pixels
from stages.core.artifacts.provenance import policy_digest
from stages.core.errors import UserError
from stages.core.execution.stopping import STOP, Stopped
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.loading import ModelError
from stages.core.training.held_out import HeldOutFiles
from stages.core.training.online.settings import JudgeSettings
from stages.core.training.settings import Execution
from stages.core.training.step_judge.estimates import Estimates
from stages.core.training.step_judge.loop import StepJudgeTraining
from stages.core.training.step_judge.settings import StepJudgeSettings, TrainableJudge
from stages.metrics.step_aware import StepAwarePreference
from stages.metrics.step_judge import load_judge
from tests import flow_models
from tests.builders import CAPTIONS, LORA, human_row, picture, read_rows, settings, write_rows
from tests.failing_model import Interrupted
from tests.metrics import official
from tests.stages.test_processes import words
from tests.stages.test_train_online import ROOT, SPO, finish, kill_once_saved
from tests.tiny_models import tokenizer

SMALL = StepJudgeSettings(
    num_steps=4, batch_pairs=3, learning_rate=1e-3, warmup_steps=1, guidance_scale=3.0
)
CPU = torch.device("cpu")
Make = Callable[..., train_step_judge.Args]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP and its words."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer(folder / "words")
    official.clip_folder(folder / "clip", activation="gelu", seed=1)
    return folder


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory, tiny_base: str) -> HeldOutFiles:
    """Pairs of which people prefer the sharp picture to the faded one; named as if held out."""
    folder = tmp_path_factory.mktemp("sharp")
    imported = import_preferences.Args(
        files=(write_rows(folder / "human.parquet", [human_row(c, 1) for c in CAPTIONS[:30]]),),
        num_pairs=24, num_holdout=6, seed=0,
        preferences=folder / "preferences.parquet", holdout=folder / "holdout.parquet",
        summary=folder / "import.json",
    )  # fmt: skip
    import_preferences.main(imported)
    for name in ("preferences", "holdout"):
        encode_preferences.main(
            encode_preferences.Args(
                preferences=folder / f"{name}.parquet",
                model=settings(tiny_base),
                output=folder / f"{name}_latents.parquet",
            )
        )
    return HeldOutFiles(
        preferences=folder / "holdout.parquet", latents=folder / "holdout_latents.parquet",
        num_pairs=6, num_draws=2, every_steps=2,
    )  # fmt: skip


@pytest.fixture
def make(sharp: HeldOutFiles, clip: Path, tiny_base: str, tmp_path: Path) -> Make:
    """The arguments of a small training in a folder of its own."""

    def args(name: str, judge: StepJudgeSettings = SMALL, **changes: Any) -> train_step_judge.Args:
        folder, data = tmp_path / name, sharp.preferences.parent
        plain = train_step_judge.Args(
            preferences=data / "preferences.parquet",
            latents=data / "preferences_latents.parquet",
            model=settings(tiny_base),
            clip=str(clip / "clip"),
            tokenizer=str(clip / "words"),
            settings=judge,
            held_out=sharp,
            seed=0,
            output=folder / "judge",
            training=folder / "training.parquet",
            curve=folder / "curve.parquet",
            work=folder / "work",
            threads=1,
        )
        return replace(plain, **changes)

    return args


def begun(args: train_step_judge.Args) -> TrainableJudge:
    """The network as the stage begins it."""
    seed = seed_of(args.seed, "train_step_judge", "weights")
    return load_judge(args.clip, args.tokenizer, seed=seed, device=CPU)


def without_speed(args: train_step_judge.Args) -> list[dict[str, Any]]:
    rows = read_rows(args.training)
    return [{k: v for k, v in row.items() if k != "pairs_per_second"} for row in rows]


def test_it_begins_as_clip_at_every_timestep(make: Make, clip: Path, tmp_path: Path) -> None:
    judge = begun(make("any"))
    judge.save(tmp_path / "saved")
    options = {"weights": str(tmp_path / "saved"), "tokenizer": str(clip / "words")}
    scorer = StepAwarePreference(options, CPU)
    images = np.stack([picture(caption) for caption in CAPTIONS[:3]])
    plain = CLIPModel.from_pretrained(clip / "clip").eval()
    with torch.no_grad():
        found = plain(input_ids=scorer.prompts.tokens(CAPTIONS[:3]), pixel_values=judge.see(images))
    expected = found.logits_per_image.diag().tolist()
    for timestep in (0, 1, 251, 999):
        scores = scorer(images=images, prompts=CAPTIONS[:3], timestep=timestep)
        assert scores.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_it_learns_what_people_prefer_on_pairs_that_it_has_not_seen(make: Make, clip: Path) -> None:
    learning = replace(SMALL, num_steps=60, batch_pairs=8, learning_rate=5e-4, warmup_steps=5)
    args = make("learnt", learning)
    args = replace(args, held_out=replace(args.held_out, every_steps=60))
    train_step_judge.main(args)
    steps, curve = read_rows(args.training), read_rows(args.curve)
    assert [step["step"] for step in steps] == list(range(1, 61))
    assert [(p["step"], p["timestep"]) for p in curve] == [
        (step, timestep) for step in (0, 60) for timestep in (0, 251, 501, 701, 951)
    ]
    last = {p["timestep"]: p for p in curve if p["step"] == 60}
    assert last[0]["accuracy"] == last[251]["accuracy"] == 1
    assert max(last[0]["log_loss"], last[251]["log_loss"]) < math.log(2) / 2
    assert all(p["num_pairs"] == 6 for p in curve)
    manifest = json.loads((args.output / "manifest.json").read_text())
    assert (manifest["num_pairs"], manifest["num_steps"]) == (24, 60)
    assert str(clip / "clip" / "pytorch_model.bin") in manifest["sail_inputs"]
    assert not args.work.exists()
    # It is the published layout, and scores as the one that was trained.
    options = {"weights": str(args.output), "tokenizer": str(clip / "words")}
    scorer = StepAwarePreference(options, CPU)
    caption = CAPTIONS[35]
    images = np.stack([picture(caption), picture(caption, strength=0.5, edge_width=6)])
    clear, faded = scorer(images=images, prompts=[caption] * 2, timestep=0)
    assert clear > faded


def test_the_first_loss_is_that_of_the_published_formula(
    make: Make, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen images are caught; scores, labels and weights are worked out anew, in float64."""
    shown: list[tuple[np.ndarray, list[int]]] = []
    seen = Estimates.seen

    def caught(self: Estimates, *words: Any) -> Any:
        images = seen(self, *words)
        shown.append((images, words[2].tolist()))
        return images

    monkeypatch.setattr(Estimates, "seen", caught)
    args = make("first", replace(SMALL, num_steps=1, warmup_steps=0))
    args = replace(args, held_out=replace(args.held_out, num_pairs=0))
    train_step_judge.main(args)
    ((images, timesteps),) = shown
    assert timesteps[:3] == timesteps[3:]
    assert len(set(timesteps)) == 3
    plain = CLIPModel.from_pretrained(clip / "clip").eval().double()
    judge = begun(args)
    prompts = [row["prompt"] for row in read_rows(args.preferences)]
    order = np.random.default_rng(seed_of(seed_of(0, "train_step_judge"), "order", 0))
    rows = order.permutation(24)[:3]
    with torch.no_grad():
        found = plain(
            input_ids=judge.read([prompts[row] for row in rows]),
            pixel_values=judge.see(images).double(),
        ).logits_per_image
    first, second = found[:3].diag(), found[3:].diag()
    expected = float(torch.log1p(torch.exp(second - first)).mean())  # no prompt has two pairs
    assert read_rows(args.training)[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_what_it_sees_is_what_the_base_takes_the_image_for(
    model: DiffusionModel, sharp: HeldOutFiles
) -> None:
    """Against diffusers' own DDIM step, with guidance, at one timestep."""
    rng = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn((2, *model.latents_shape), generator=rng) for _ in range(2))
    text, none = model.encode_text(CAPTIONS[:2]), model.unconditional()
    estimates = Estimates.of(model, none, 5.0)
    found = estimates.seen(latents, noise, torch.tensor([501, 501]), text)
    scheduler = DDIMScheduler.from_config(model.sampler("ddim").config)
    scheduler.set_timesteps(1000 - 1)
    times = torch.tensor([501, 501])
    noised = scheduler.add_noise(latents, noise, times)
    with torch.no_grad():
        plain = model.predict(estimates.denoiser, noised, times, none.repeat(2))
        told = model.predict(estimates.denoiser, noised, times, text)
    step = scheduler.step(plain + 5 * (told - plain), 501, noised)
    expected = to_pixels(model.decode_latents(step.pred_original_sample).numpy())
    assert np.abs(found.astype(int) - np.stack(expected).astype(int)).max() <= 1
    near = estimates.seen(latents, noise, torch.tensor([0, 0]), text)
    finished = estimates.finished(latents)
    assert (
        np.abs(near.astype(int) - finished.astype(int)).mean()
        < np.abs(found.astype(int) - finished.astype(int)).mean()
    )


def cut_after(number: int) -> Callable[..., Any]:
    step = StepJudgeTraining._take_step

    def cut(self: StepJudgeTraining, wanted: int) -> Any:
        if wanted > number:
            raise Interrupted
        return step(self, wanted)

    return cut


@pytest.mark.slow
def test_a_killed_training_ends_with_the_tables_and_weights_of_an_unbroken_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, args = (
        make(name, execution=Execution(save_every=1)) for name in ("unbroken", "broken")
    )
    train_step_judge.main(unbroken)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StepJudgeTraining, "_take_step", cut_after(3))
        train_step_judge.main(args)
    assert not args.output.exists()
    assert json.loads((args.work / "state.json").read_text())["weights"] == "step-000003.pt"
    taken: list[int] = []
    step = StepJudgeTraining._take_step
    with monkeypatch.context() as patch:
        patch.setattr(
            StepJudgeTraining, "_take_step",
            lambda self, number: (taken.append(number), step(self, number))[1],
        )  # fmt: skip
        train_step_judge.main(args)
    assert taken == [4]
    assert without_speed(args) == without_speed(unbroken)
    assert read_rows(args.curve) == read_rows(unbroken.curve)
    assert policy_digest(args.output) == policy_digest(unbroken.output)


@pytest.mark.slow
def test_a_training_that_is_asked_to_stop_saves_its_step(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = make("stopped")
    monkeypatch.setattr(STOP, "is_asked", False)
    seen = Estimates.seen
    calls: list[int] = []

    def asked(self: Estimates, *words: Any) -> Any:
        calls.append(1)
        if (
            len(calls) == 4 + 2
        ):  # four noise levels of the held-out pairs, then a step, then the next
            STOP.ask()
        return seen(self, *words)

    monkeypatch.setattr(Estimates, "seen", asked)
    with pytest.raises(Stopped, match="state of step 2 is saved"):
        train_step_judge.main(args)
    monkeypatch.setattr(STOP, "is_asked", False)
    monkeypatch.setattr(Estimates, "seen", seen)
    train_step_judge.main(args)
    assert len(read_rows(args.training)) == 4


@pytest.mark.slow
def test_micro_batches_and_checkpointing_change_only_the_rounding(make: Make) -> None:
    plain = make("plain")
    small = make("small", execution=Execution(micro_batch_pairs=2, gradient_checkpointing=True))
    for args in (plain, small):
        train_step_judge.main(args)
    for row, other in zip(without_speed(small), without_speed(plain), strict=True):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name


def start(args: train_step_judge.Args, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ["stages.launch", str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "stages.train_step_judge", *words(asdict(args))],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_training_killed_by_the_kernel_goes_on_to_the_same_end(make: Make) -> None:
    longer = replace(SMALL, num_steps=12)
    unbroken, args = (
        make(name, longer, execution=Execution(save_every=1)) for name in ("unbroken", "killed")
    )
    finish(start(unbroken))
    kill_once_saved(start(args), args.work)
    assert not args.output.exists()
    assert "continuing from step" in finish(start(args))
    assert without_speed(args) == without_speed(unbroken)
    assert read_rows(args.curve) == read_rows(unbroken.curve)
    assert policy_digest(args.output) == policy_digest(unbroken.output)


@pytest.mark.slow
def test_two_processes_do_as_one(make: Make) -> None:
    even = replace(SMALL, batch_pairs=4, num_steps=2)
    alone, shared = make("alone", even), make("shared", even)
    train_step_judge.main(alone)
    assert "training on 2 processes" in finish(start(shared, 2))
    for row, other in zip(without_speed(shared), without_speed(alone), strict=True):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=2e-3, abs=1e-4), name
    policy_digest(shared.output)


@pytest.mark.slow
def test_the_clip_that_it_begins_with_may_label(make: Make, clip: Path) -> None:
    """Its own labels are by the finished images; with a large gap asked for all are ties, which teach nothing."""
    start = replace(SMALL, labels="clip", min_label_gap=0.999, num_steps=2)
    ties = make("ties", start)
    train_step_judge.main(ties)
    assert [row["tie_share"] for row in read_rows(ties.training)] == [1, 1]
    decided = make("decided", replace(start, min_label_gap=0.0))
    train_step_judge.main(decided)
    assert [row["tie_share"] for row in read_rows(decided.training)] == [0, 0]


def test_it_judges_an_online_training(
    make: Make, clip: Path, sharp: HeldOutFiles, tiny_base: str, tmp_path: Path
) -> None:
    args = make("judge", replace(SMALL, num_steps=1, warmup_steps=0))
    train_step_judge.main(args)
    pool = tmp_path / "pool.txt"
    pool.write_text("\n".join(CAPTIONS[34:38]) + "\n")
    prompts = tmp_path / "prompts.parquet"
    select_prompts.main(
        select_prompts.Args(
            pool=(pool,), exclude=(), shuffle_seed=0, skip=0, take=4, output=prompts
        )
    )
    options = {"weights": str(args.output), "tokenizer": str(clip / "words")}
    online = train_online.Args(
        prompts=prompts, model=settings(tiny_base), lora=LORA, settings=replace(SPO, rounds=1),
        judge=JudgeSettings(name="spm", options=options), held_out=sharp, seed=0,
        output=tmp_path / "policy", training=tmp_path / "training.parquet",
        transitions=tmp_path / "transitions.parquet",
        held_out_curve=tmp_path / "held_out_curve.parquet", work=tmp_path / "work", threads=1,
    )  # fmt: skip
    train_online.main(online)
    assert all(np.ptp(row["scores"]) > 0 for row in read_rows(tmp_path / "transitions.parquet"))
    manifest = json.loads((online.output / "manifest.json").read_text())
    assert str(args.output / "manifest.json") in manifest["sail_inputs"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": "nowhere/at/all"}, r"step_judge.clip is 'nowhere/at/all': there is no such"),
        ({"tokenizer": "nowhere/at/all"}, r"step_judge.tokenizer is 'nowhere/at/all'"),
        ({"settings": replace(SMALL, warmup_steps=5)}, "warmup_steps is 5 and num_steps is 4"),
    ],
)
def test_bad_input_is_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    args = make("bad", **changes)
    with pytest.raises(UserError, match=message):
        train_step_judge.main(args)
    assert not args.output.exists()


def test_a_flow_model_has_no_such_judge(make: Make, tmp_path: Path) -> None:
    base = flow_models.sana(tmp_path / "sana")
    with pytest.raises(ModelError, match="step_judge.clip is set, but"):
        train_step_judge.main(make("flow", model=settings(base)))


@pytest.mark.slow
def test_preflight_says_what_its_training_takes(
    clip: Path, tiny_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["model"]["base"] = tiny_base
    config["step_judge"] = {
        "clip": str(clip / "clip"), "tokenizer": str(clip / "words"), "num_steps": 6,
        "warmup_steps": 1, "batch_pairs": 7, "labels": "clip",
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    preflight.main(preflight.Args(config=(path,), results=tmp_path, threads=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if "step judge" in line]
    assert [[part.strip() for part in line.split("│")[1:3]] for line in lines] == [
        ["train the step judge", "42 pairs"], ["step judge", "0.00"],
    ]  # fmt: skip
    config["step_judge"]["clip"] = str(tmp_path / "nothing")
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"step_judge\.clip is .*nothing': there is no such file"):
        preflight.main(preflight.Args(config=(path,), results=tmp_path, threads=1))
