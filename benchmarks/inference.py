r"""Sampling and scoring beside a plain loop over diffusers, at equal model, precision, batch and results.

Example (tiny random models of the real architectures on the CPU; the real shapes need a GPU):
    python -m benchmarks.inference --output benchmarks/inference.md
    python -m benchmarks.inference --shapes real --dtype bfloat16 --output benchmarks/inference-gpu.md

Weights are random: speed does not depend on them. The plain arms are what a user of diffusers would
write: the pipeline once a prompt, then PNG files; and a scorer that encodes each image and predicts all
of its draws in one batch. Arms take turns; each figure is the median over repeats.
"""

from __future__ import annotations

import gc
import io
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import tyro
from diffusers import DDIMScheduler, DDPMScheduler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import FamilyName, build
from stages.core.artifacts.files import write_text
from stages.core.method.derivative import Derivative
from stages.core.method.noising import generator, reward_draws
from stages.core.method.scoring import Difference, Judge, draw_errors
from stages.core.method.secant import Secant
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.generation import SamplingSettings, generate

PROMPT = "an oil painting of a ship in a storm"
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {"pipeline": "StableDiffusionPipeline", "sampler": "ddpm", "guidance_scale": 7.5},
    "sdxl": {"pipeline": "StableDiffusionXLPipeline", "sampler": "ddim", "guidance_scale": 5.0},
    "sd35-medium": {
        "pipeline": "StableDiffusion3Pipeline", "sampler": "euler", "guidance_scale": 4.5,
    },
    "sd35-large": {
        "pipeline": "StableDiffusion3Pipeline", "sampler": "euler", "guidance_scale": 4.5,
    },
    "flux": {"pipeline": "FluxPipeline", "sampler": "euler", "guidance_scale": 3.5, "calls": 1},
}  # fmt: skip
"""Sampler and guidance as in Sec. 5.1 and the models' own cards; calls of the denoiser a step, if not 2."""
SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Sampling and scoring beside a plain loop over diffusers."""

    shapes: Literal["tiny", "real"] = "tiny"
    """'real' is the published architectures, which need a GPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the networks."""
    families: tuple[FamilyName, ...] = ("sd15", "sdxl")
    """Architectures."""
    works: tuple[Literal["sampling", "scoring"], ...] = ("sampling", "scoring")
    """What is measured."""
    compile: bool = False
    """Measure with model.compile, too; the turn that is not timed compiles."""
    derivative: bool = True
    """Measure the derivative, too."""
    secant: bool = True
    """Measure the secant, too."""
    prompts: int = 3
    """Prompts of a turn of sampling, one after the other: files are written while the next is sampled."""
    images_per_prompt: int = 8
    """Candidates of a prompt: one batch."""
    inference_steps: int = 20
    """Sampler steps."""
    num_draws: int = 10
    """Draws of an image's score."""
    repeats: int = 3
    """Turns of each arm, after one that is not timed."""
    models: Path | None = None
    """Folder where the random models are kept for another call; none throws them away."""
    output: Path = Path("benchmarks/inference.md")
    """Where the table goes (Markdown)."""


@dataclass(frozen=True)
class Measured:
    """One arm's figures."""

    seconds: float
    gigabytes: float | None
    result: torch.Tensor


def main(args: Args) -> None:
    """Measure both works for each family, then write the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    rate = matrix_rate(device, getattr(torch, args.dtype))
    machine = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{platform.machine()} CPU, one thread")  # fmt: skip
    command = f"python -m benchmarks.inference {' '.join(sys.argv[1:])}"
    lines = [
        f"Made by `{command}` on {machine}, torch {torch.__version__}; {args.shapes} shapes, random "
        f"weights, {args.prompts} prompts of {args.images_per_prompt} images, {args.inference_steps} sampler steps with "
        f"guidance, {args.num_draws} draws an image for both models; medians of {args.repeats}. The "
        f"machine multiplies {SIDE} x {SIDE} matrices at {rate / 1e12:.1f} TFLOP/s in {args.dtype}; the "
        "share of that rate counts the UNet's operations alone. `apart` is how far the two arms' "
        "results are from each other: grey levels of the pixels, rewards beside their standard "
        "deviation over the images.\n",
        "| family | work | arm | images/s | ratio | share of the rate | peak GB | apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for family in args.families:
        with tempfile.TemporaryDirectory() as folder:
            base = build(family, args.shapes, args.models or Path(folder))
            model = load_model(ModelSettings(base=str(base), dtype=args.dtype), device=device)
            operations_of_a_row = row_operations(model)
            steps = FAMILIES[family].get("calls", 2) * args.inference_steps
            for work, made, calls in (
                ("sampling", sampling_arms, steps),
                ("scoring", scoring_arms, 2 * args.num_draws),
            ):
                if work not in args.works:
                    continue
                arms = made(model, family, args)
                operations = calls * operations_of_a_row
                lines += rows(family, work, take_turns(arms, args.repeats, device), operations, rate,
                              args)  # fmt: skip
                del arms  # and the networks that they hold
                gc.collect()
                print("\n".join(lines[-2:]), flush=True)
    text = "\n".join(lines) + "\n"
    write_text(args.output, text)
    print(text)


Arms = dict[str, Callable[[], torch.Tensor]]


def sampling_arms(model: DiffusionModel, family: str, args: Args) -> Arms:
    """Images of some prompts as PNG files in memory; their pixels are compared."""
    facts, count = FAMILIES[family], args.images_per_prompt
    policy = model.load_denoiser()
    pipeline = getattr(diffusers, facts["pipeline"]).from_pretrained(
        model.base, torch_dtype=model.dtype, local_files_only=True,
        **{model.denoiser_part: policy.network},
    ).to(model.device)  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    if facts["sampler"] in SCHEDULERS:
        # As model_index.json's scheduler says: diffusers' own default would clip the latents.
        kind = SCHEDULERS[facts["sampler"]]
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, clip_sample=False)
    settings = SamplingSettings(
        sampler=facts["sampler"],
        num_inference_steps=args.inference_steps,
        guidance_scale=facts["guidance_scale"],
    )

    names = [f"number {number}" for number in range(args.prompts)]

    def plain() -> torch.Tensor:
        files = []
        for name in names:
            seeds = [seed_of("bench", name, number) for number in range(count)]
            images = pipeline(
                PROMPT,
                num_images_per_prompt=count,
                generator=[generator(seed) for seed in seeds],
                num_inference_steps=args.inference_steps,
                guidance_scale=facts["guidance_scale"],
            ).images
            for image in images:
                image.save(file := io.BytesIO(), format="PNG")
                files.append(file.getvalue())
        return pixels(files)

    def ours(denoiser: Denoiser) -> torch.Tensor:
        made = generate(
            model, denoiser, [(name, PROMPT) for name in names], settings, images_per_prompt=count,
            seed_parts=("bench",), prompts_per_batch=1, keep_latents=True,
        )  # fmt: skip
        return pixels([row["image"]["bytes"] for row in made])  # type: ignore[index]

    arms: Arms = {"diffusers pipeline": plain, "SAIL": partial(ours, policy)}
    if args.compile:
        arms["SAIL, compiled"] = partial(ours, model.load_denoiser().compile())
    return arms


def pixels(files: list[bytes]) -> torch.Tensor:
    """The decoded images."""
    import numpy as np
    from PIL import Image

    return torch.from_numpy(
        np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files])
    ).float()


def scoring_arms(model: DiffusionModel, family: str, args: Args) -> Arms:
    """One prompt's implicit rewards; the policy is the base with noise on its weights."""
    reference, policy = model.load_denoiser(), perturbed(model)
    count = args.images_per_prompt
    images = torch.rand((count, 3, *model.image_size), generator=generator(1)) * 2 - 1
    latents = torch.cat([model.encode_images(image[None]).float().cpu() for image in images])
    draws = reward_draws(
        2, num_draws=args.num_draws, num_timesteps=model.num_timesteps,
        latents_shape=model.latents_shape,
    )  # fmt: skip

    def plain() -> torch.Tensor:
        text, rewards = model.encode_text([PROMPT]), []
        timesteps, noise = draws.timesteps.to(model.device), draws.noise.to(model.device)
        with torch.no_grad():
            for image in images:
                clean = model.encode_images(image[None]).float().repeat(args.num_draws, 1, 1, 1)
                noised = model.add_noise(clean, noise, timesteps).to(model.dtype)
                target = model.target(clean, noise, timesteps)
                context = text.repeat(args.num_draws)
                errors = [
                    (model.predict(network, noised, timesteps, context).float() - target)
                    .square().mean(dim=(1, 2, 3))
                    for network in (policy, reference)
                ]  # fmt: skip
                rewards.append((errors[1] - errors[0]).mean().cpu())
        return torch.stack(rewards)

    def ours(judge: Judge) -> torch.Tensor:
        found = draw_errors(
            model, judge, latents, model.encode_text([PROMPT]), draws, rows_per_batch=40
        )
        return (found.reference - found.policy).mean(dim=1)

    arms: Arms = {"plain scorer": plain, "SAIL": partial(ours, Difference(policy, reference))}
    if args.compile:
        compiled = Difference(
            Denoiser(policy.network).compile(), Denoiser(reference.network).compile()
        )
        arms["SAIL, compiled"] = partial(ours, compiled)
    if args.secant or args.derivative:
        weights, base = (
            {name: value.data.float().cpu() for name, value in denoiser.network.named_parameters()}
            for denoiser in (policy, reference)
        )
    if args.secant:
        arms["SAIL, by secant"] = partial(ours, Secant.between(model, weights, base))
    if args.derivative:
        derivative = Derivative.between(reference.network, weights, base)
        arms["SAIL, by derivative"] = partial(ours, derivative)
    return arms


def perturbed(model: DiffusionModel) -> Denoiser:
    """The base, visibly moved."""
    denoiser = model.load_denoiser()
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(0.02 * weight.std(correction=0) * torch.randn_like(weight))
    return denoiser


def take_turns(arms: Arms, repeats: int, device: torch.device) -> dict[str, Measured]:
    """Medians of all arms, measured in turns after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    peaks: dict[str, float] = {}
    results = {name: arm() for name, arm in arms.items()}
    for _ in range(repeats):
        for name, arm in arms.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            arm()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
            taken[name].append(time.monotonic() - started)
    return {name: Measured(statistics.median(taken[name]), peaks.get(name), results[name])
            for name in arms}  # fmt: skip


def rows(
    family: str,
    work: str,
    measured: dict[str, Measured],
    operations: float,
    rate: float,
    args: Args,
) -> list[str]:
    """The table's rows; ratios are to the first arm."""
    first = next(iter(measured.values()))
    found = []
    prompts = args.prompts if work == "sampling" else 1
    for name, arm in measured.items():
        speed = prompts * args.images_per_prompt / arm.seconds
        apart = (arm.result - first.result).abs()
        shown = (
            f"mean {float(apart.mean()):.2g}, at most {float(apart.max()):.0f} of 255"
            if work == "sampling"
            else f"{float(apart.max() / first.result.std()):.1e} of the spread"
        )
        memory = "-" if arm.gigabytes is None else f"{arm.gigabytes:.1f}"
        found.append(
            f"| {family} | {work} | {name} | {speed:.2f} | {first.seconds / arm.seconds:.2f} | "
            f"{speed * operations / rate:.2f} | {memory} | {shown} |"
        )
    return found


def row_operations(model: DiffusionModel) -> float:
    """Floating-point operations of one row through the denoiser."""
    denoiser = model.load_denoiser()
    latents = torch.zeros((1, *model.latents_shape), device=model.device, dtype=model.dtype)
    timesteps = torch.zeros(1, dtype=torch.int64, device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.predict(denoiser, latents, timesteps, model.encode_text([PROMPT]))
    return float(counter.get_total_flops())


SIDE = 4096 if torch.cuda.is_available() else 1024


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product of random matrices."""
    a, b = (torch.randn((SIDE, SIDE), device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.monotonic()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.monotonic() - started)
    return float(2 * SIDE**3 / statistics.median(taken))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
