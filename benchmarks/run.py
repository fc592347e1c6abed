r"""Sampling, scoring and training beside what a competent user would write with diffusers; memory and shards.

Example (two CPU cores, some minutes; the real sizes need a GPU):
    make bench
    python -m benchmarks.run --suites sd15 sdxl --dtype bfloat16

Both arms of a work have the same model, precision, batch and noise, and take turns in one process; figures are
medians with the least and the most beside them, and how far the arms' results are apart is measured in the same run.
The plain arms are written here: diffusers' pipeline once a prompt; a scorer that encodes each image and predicts all
of its draws in a batch; a Diffusion-DPO step that encodes images and captions, predicts with both models, and trains.
Weights are random but for the embedded world's: speed does not depend on them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch.nn import functional

from benchmarks.inference import Args as Inference
from benchmarks.inference import Arms, matrix_rate, row_operations, sampling_arms, scoring_arms
from stages.core.artifacts.files import write_text
from stages.core.artifacts.schemas import PROMPTS
from stages.core.artifacts.tables import write_table
from stages.core.method.noising import generator, training_draws
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser, LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.encoding import EncodedPairs, encode_captions
from stages.core.training.loop import Training
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings
from tests import tiny_models

SuiteName = Literal["embedded", "middle", "sd15", "sdxl"]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A model and how much is done with it in a turn."""

    family: Literal["sd15", "sdxl"]
    prompts: int
    images_per_prompt: int
    inference_steps: int
    num_draws: int
    batch_pairs: int
    steps: int
    """Optimizer steps of a training."""


SUITES: dict[SuiteName, Suite] = {
    "embedded": Suite(family="sd15", prompts=4, images_per_prompt=8, inference_steps=12,
                      num_draws=10, batch_pairs=16, steps=6),
    "middle": Suite(family="sd15", prompts=2, images_per_prompt=4, inference_steps=4,
                    num_draws=5, batch_pairs=4, steps=4),
    "sd15": Suite(family="sd15", prompts=3, images_per_prompt=8, inference_steps=20,
                  num_draws=10, batch_pairs=8, steps=4),
    "sdxl": Suite(family="sdxl", prompts=2, images_per_prompt=8, inference_steps=20,
                  num_draws=10, batch_pairs=4, steps=4),
}  # fmt: skip
CAPTIONS = ["a green cross at the bottom", "an oil painting of a ship in a storm", "a cat in a hat"]
RATE, WEIGHT_DECAY, CLIP, BETA, SEED = 1e-5, 0.01, 1.0, 5000.0, 3


@dataclass(frozen=True, kw_only=True)
class Args:
    """Each model stage beside a plain loop over diffusers."""

    suites: tuple[SuiteName, ...] = ("embedded", "middle")
    """Models: the embedded world's; SD1.5's shape made narrow; SD1.5 and SDXL at their published size."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks."""
    works: tuple[Literal["sampling", "scoring", "training", "growth"], ...] = (
        "sampling", "scoring", "training", "growth",
    )  # fmt: skip
    """What is measured; 'growth' is memory and time of `sample_candidates` with more prompts, candidates, shards."""
    compile: bool = False
    """Measure sampling and scoring with model.compile, too."""
    repeats: int = 5
    """Turns of each arm, after one that is not timed."""
    threads: int = 1
    """CPU threads."""
    output: Path = Path("work/bench.md")
    """Where the tables go (Markdown); beside it the same as JSON."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """An arm of a work."""

    suite: str
    work: str
    arm: str
    unit: str
    """What is counted."""
    per_second: float
    """The median."""
    least: float
    most: float
    ratio: float
    """To the plain arm."""
    share: float
    """Of the machine's matrix rate, counting the denoiser alone."""
    gigabytes: float | None
    """Peak on the device; None on a CPU, where a process has one peak."""
    apart: str
    """From the plain arm's result."""


def main(args: Args) -> None:
    """Measure every suite, then write the tables."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    rate = matrix_rate(device, getattr(torch, args.dtype))
    results: list[Result] = []
    growth: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.suites:
            base = build(name, Path(folder))
            settings = ModelSettings(base=str(base), dtype=args.dtype)
            for work in args.works:
                if work == "growth":
                    growth += grown(name, settings, SUITES[name], Path(folder), args)
                else:
                    results += measured(name, work, settings, device, rate, args)
                    print("\n".join(map(line, results[-2:])), file=sys.stderr, flush=True)
    facts = {
        "command": f"python -m benchmarks.run {' '.join(sys.argv[1:])}".strip(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else
        f"{os.cpu_count()} {platform.machine()} CPU cores, {args.threads} thread(s)",
        "torch": torch.__version__, "dtype": args.dtype, "repeats": args.repeats,
        "matrix_tflops": round(rate / 1e12, 2),
    }  # fmt: skip
    write_text(args.output, page(facts, results, growth))
    write_text(
        args.output.with_suffix(".json"),
        json.dumps({**facts, "results": [asdict(r) for r in results], "growth": growth}, indent=1)
        + "\n",
    )
    print(args.output.read_text())


def build(name: SuiteName, folder: Path) -> Path:
    """The suite's model in diffusers' layout."""
    if name == "embedded":
        return Path(__file__).parents[1] / "stages/shapes/pipeline"
    builders = {"middle": tiny_models.middle_size_sd15, "sd15": tiny_models.real_sd15,
                "sdxl": tiny_models.real_sdxl}  # fmt: skip
    return builders[name](folder / name)


def measured(
    name: SuiteName,
    work: Literal["sampling", "scoring", "training"],
    settings: ModelSettings,
    device: torch.device,
    rate: float,
    args: Args,
) -> list[Result]:
    """The arms of one work."""
    suite = SUITES[name]
    model = load_model(settings, device=device)
    operations = row_operations(model)
    how = Inference(
        dtype=args.dtype, prompts=suite.prompts, images_per_prompt=suite.images_per_prompt,
        inference_steps=suite.inference_steps, num_draws=suite.num_draws, compile=args.compile,
        derivative=False, secant=False,
    )  # fmt: skip
    if work == "sampling":
        arms, unit = sampling_arms(model, suite.family, how), "images/s"
        count, calls = suite.prompts * suite.images_per_prompt, 2 * suite.inference_steps
    elif work == "scoring":
        arms, unit = scoring_arms(model, suite.family, how), "images/s"
        count, calls = suite.images_per_prompt, 2 * suite.num_draws
    else:
        arms, unit = training_arms(model, suite), "pairs/s"
        # forward and backward of the policy, forward of the reference, both images: backward is twice forward
        count, calls = suite.steps * suite.batch_pairs, 8
    return turns(name, work, arms, unit, count, calls * operations / rate, args, device)


def turns(
    name: str,
    work: str,
    arms: Arms,
    unit: str,
    count: int,
    seconds_at_rate: float,
    args: Args,
    device: torch.device,
) -> list[Result]:
    """Measure arms in turns, after one turn of each that is not counted."""
    found = {arm: call() for arm, call in arms.items()}
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    peaks: dict[str, float] = {}
    for _ in range(args.repeats):
        for arm, call in arms.items():
            _settle(device)
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[arm] = torch.cuda.max_memory_allocated() / 1e9
            taken[arm].append(time.perf_counter() - started)
    plain = next(iter(arms))
    medians = {arm: statistics.median(seconds) for arm, seconds in taken.items()}
    return [
        Result(
            suite=name, work=work, arm=arm, unit=unit,
            per_second=count / medians[arm],
            least=count / max(seconds), most=count / min(seconds),
            ratio=medians[plain] / medians[arm],
            share=seconds_at_rate * count / medians[arm],
            gigabytes=peaks.get(arm),
            apart=distance(work, found[arm], found[plain]),
        )
        for arm, seconds in taken.items()
    ]  # fmt: skip


def distance(work: str, found: torch.Tensor, plain: torch.Tensor) -> str:
    """How far an arm's result is from the plain arm's, in words."""
    apart = (found - plain).abs()
    if work == "sampling":
        return f"at most {float(apart.max()):.0f} of 255 grey levels"
    if work == "scoring":
        return f"{float(apart.max() / plain.std()):.1e} of the rewards' spread"
    return f"{float(apart.norm() / plain.norm()):.1e} of the weights' way"


def training_arms(model: DiffusionModel, suite: Suite) -> Arms:
    """Diffusion-DPO steps of a full fine-tune; the result is how far the weights have moved."""
    count = suite.steps * suite.batch_pairs
    pixels = torch.rand((2, count, 3, *model.image_size), generator=generator(5)) * 2 - 1
    captions = [CAPTIONS[number % len(CAPTIONS)] for number in range(count)]
    settings = TrainingSettings(
        dpo_beta=BETA, learning_rate=RATE, batch_pairs=suite.batch_pairs, passes=1.0, warmup_share=0.0,
        gradient_clip=CLIP, weight_decay=WEIGHT_DECAY, caption_dropout=0.0,
    )  # fmt: skip
    lora = LoraSettings(rank=0)
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    assert reference is not None
    start = [weight.detach().clone() for weight in policy.trainable()]
    encoded = EncodedPairs(
        winner=encode(model, pixels[0], suite.batch_pairs), loser=encode(model, pixels[1], suite.batch_pairs),
        caption=torch.tensor([sorted(CAPTIONS).index(caption) for caption in captions]),
        text=encode_captions(model, [*sorted(CAPTIONS), ""]),
        winner_geometry=model.native_geometry(count), loser_geometry=model.native_geometry(count),
    )  # fmt: skip

    @torch.no_grad()
    def reset() -> None:
        for weight, before in zip(policy.trainable(), start, strict=True):
            weight.copy_(before)
            weight.grad = None
            weight.requires_grad_(True)

    def way() -> torch.Tensor:
        return torch.cat([
            (weight.detach() - before).flatten().float().cpu()
            for weight, before in zip(policy.trainable(), start, strict=True)
        ])  # fmt: skip

    def plain() -> torch.Tensor:
        reset()
        plain_training(model, policy, reference, pixels, captions, suite)
        return way()

    def ours() -> torch.Tensor:
        reset()
        Training(
            model, policy, reference, encoded, settings, seed=SEED, work=Path(tempfile.gettempdir()) / "unused",
            identity="", processes=Processes(model.device), execution=Execution(save_minutes=10**9),
        ).run()  # fmt: skip
        return way()

    return {"plain step": plain, "SAIL": ours}


def plain_training(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser,
    pixels: torch.Tensor,
    captions: Sequence[str],
    suite: Suite,
) -> None:
    """What a Diffusion-DPO script does in each step, from pixels and captions."""
    import numpy as np

    parameters = list(policy.trainable())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=WEIGHT_DECAY)
    order = np.random.default_rng(seed_of(SEED, "order", 0)).permutation(len(captions))
    for number in range(1, suite.steps + 1):
        rows = order[(number - 1) * suite.batch_pairs : number * suite.batch_pairs]
        draws = training_draws(
            seed_of(SEED, "draws", number), num_pairs=len(rows), num_timesteps=model.num_timesteps,
            latents_shape=model.latents_shape,
        )  # fmt: skip
        noise = draws.noise.to(model.device).repeat(2, 1, 1, 1)
        timesteps = draws.timesteps.to(model.device).repeat(2)
        with torch.no_grad():
            both = torch.cat([pixels[0][rows], pixels[1][rows]])
            latents = model.encode_images(both).float()
            text = model.encode_text([captions[row] for row in rows]).repeat(2)
            context = model.place(text, model.native_geometry(2 * len(rows)).to(model.device))
            noised, target = (
                make(latents, noise, timesteps) for make in (model.add_noise, model.target)
            )
            with model.autocast():
                beside = model.predict(reference, noised, timesteps, context).float()
        with model.autocast():
            predicted = model.predict(policy, noised, timesteps, context).float()
        errors = (predicted - target).square().mean(dim=(1, 2, 3))
        gains = errors - (beside - target).square().mean(dim=(1, 2, 3))
        winner, loser = gains.chunk(2)
        loss = -functional.logsigmoid(-0.5 * BETA * (winner - loser)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def encode(model: DiffusionModel, images: torch.Tensor, size: int) -> torch.Tensor:
    """Latents of images, some at a time."""
    starts = range(0, len(images), size)
    parts = [model.encode_images(images[start : start + size]) for start in starts]
    return torch.cat([part.float().cpu() for part in parts])


def grown(
    name: str, settings: ModelSettings, suite: Suite, folder: Path, args: Args
) -> list[dict[str, Any]]:
    """Seconds and peak host memory of `sample_candidates`, each in a process of its own."""
    usual = {"prompts": 2 * suite.prompts, "candidates": suite.images_per_prompt, "shards": 1}
    cases = [
        *({**usual, "prompts": times * usual["prompts"]} for times in (1, 4, 16)),
        *({**usual, "candidates": count} for count in (2, 16)),
        {**usual, "shards": 2},
    ]
    return [
        {"suite": name, **case, **sampled(settings, suite, case, folder, args)} for case in cases
    ]


def sampled(
    settings: ModelSettings, suite: Suite, case: dict[str, int], folder: Path, args: Args
) -> dict[str, float]:
    """CPU and wall seconds of all shards, and the peak of the largest."""
    work = folder / "growth"
    shutil.rmtree(work, ignore_errors=True)
    rows = [
        {"prompt_id": f"{number:08x}", "prompt": f"{CAPTIONS[number % 3]}, {number}"}
        for number in range(case["prompts"])
    ]
    write_table(work / "prompts.parquet", rows, PROMPTS, stage="bench", arguments={})
    wall = cpu = peak = 0.0
    for shard in range(case["shards"]):
        words = [
            "-m", "stages.sample_candidates", "--prompts", work / "prompts.parquet",
            "--model.base", settings.base, "--model.dtype", settings.dtype, "--policy", "base",
            "--settings.sampler", "ddim", "--settings.num-inference-steps", suite.inference_steps,
            "--settings.guidance-scale", 5.0, "--candidates-per-prompt", case["candidates"],
            "--seed", 0, "--iteration", 1, "--shard", shard, "--num-shards", case["shards"],
            "--threads", args.threads, "--output", work / f"shard-{shard}.parquet",
        ]  # fmt: skip
        started = time.perf_counter()
        process = os.posix_spawn(
            sys.executable, [sys.executable, *map(str, words)], os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)],
        )  # fmt: skip
        _, status, used = os.wait4(process, 0)
        if status:
            raise RuntimeError(
                f"sample_candidates ended with {os.waitstatus_to_exitcode(status)}: {words}"
            )
        wall += time.perf_counter() - started
        cpu += used.ru_utime + used.ru_stime
        peak = max(peak, used.ru_maxrss * 1024 / 1e9)
    return {"wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "peak_gb": round(peak, 3)}


def page(facts: dict[str, Any], results: Sequence[Result], growth: Sequence[dict[str, Any]]) -> str:
    """The tables."""
    lines = [
        "# Speed beside a plain loop over diffusers\n",
        f"Made by `{facts['command']}` on {facts['machine']}, torch {facts['torch']}; {facts['dtype']}, medians of "
        f"{facts['repeats']} turns with the least and the most. The machine multiplies matrices at "
        f"{facts['matrix_tflops']} TFLOP/s; the share of that rate counts the denoiser's operations alone.\n",
        "| suite | work | arm | rate | least to most | ratio | share | peak GB | apart |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(line, results),
    ]
    if growth:
        lines += [
            "\n`sample_candidates`, each case in processes of its own, start included:\n",
            "| suite | prompts | candidates | shards | wall s | CPU s | peak host GB |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {g['suite']} | {g['prompts']} | {g['candidates']} | {g['shards']} | {g['wall_s']:.1f} | "
                f"{g['cpu_s']:.1f} | {g['peak_gb']:.2f} |"
                for g in growth
            ),
        ]
    return "\n".join(lines) + "\n"


def line(result: Result) -> str:
    """A row of the first table."""
    memory = "-" if result.gigabytes is None else f"{result.gigabytes:.1f}"
    return (
        f"| {result.suite} | {result.work} | {result.arm} | {result.per_second:.2f} {result.unit} | "
        f"{result.least:.2f} to {result.most:.2f} | {result.ratio:.2f} | {result.share:.2f} | {memory} | "
        f"{result.apart} |"
    )


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
