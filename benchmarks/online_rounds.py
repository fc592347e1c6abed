r"""Seconds and memory of a round of SPO, DDPO and D3PO, beside a plain loop over diffusers, and whether they agree.

Example (minutes on one CPU core):
    python -m benchmarks.online_rounds --output benchmarks/online_rounds.md

The plain loop is what a script does: diffusers' pipeline and its DDIM scheduler with eta = 1, a log-probability of each
step, the oracle of the embedded world as the judge, one forward and backward pass for each step of the chain. It is told
the product's prompts, seeds and batches, and nothing else of it. Each arm has a process of its own, for its peak of memory.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.world import row
from stages.core.artifacts.files import write_text
from stages.core.execution.runtime import choose_device
from stages.core.method.seeding import seed_of
from stages.core.method.trajectories import Chains
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.encoding import encode_captions
from stages.core.training.online.batches import batches
from stages.core.training.online.judges import ImageJudge, StepJudge
from stages.core.training.online.loop import OnlineTraining
from stages.core.training.online.rollouts import Prompt
from stages.core.training.online.rounds import Asked, Shown
from stages.core.training.online.settings import Method, OnlineSettings
from stages.core.training.online.transitions import Transitions
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution
from stages.metrics import load_scorer
from stages.shapes.captions import open_captions
from stages.shapes.oracle import total

Side = Literal["SAIL", "plain"]
SEED = 104
SPO = OnlineSettings(
    method="spo", rounds=2, prompts_per_update=8, candidates_per_prompt=4, num_inference_steps=8,
    guidance_scale=5.0, learning_rate=1e-5, batch_transitions=28, ratio_clip=0.1, divert_step=1,
)  # fmt: skip
METHODS: dict[Method, OnlineSettings] = {
    "spo": SPO,
    "ddpo": replace(
        SPO, method="ddpo", batch_transitions=128, ratio_clip=1e-4, prompt_buffer=0,
    ),
    "d3po": replace(SPO, method="d3po", candidates_per_prompt=2, preference_beta=0.1),
}  # fmt: skip
"""Eight prompts a round; as many optimizer steps as the transitions fill."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Seconds and memory of a round, by method."""

    methods: tuple[Method, ...] = ("spo", "ddpo", "d3po")
    """Which."""
    rounds: int = 3
    """Rounds of each."""
    base: str = "stages/shapes/pipeline"
    """The embedded model."""
    threads: int = 1
    """CPU threads."""
    output: Path = Path("benchmarks/online_rounds.md")
    """Where the table goes (Markdown)."""
    one: tuple[Method, Side] | None = None
    """A single arm, which this process runs; for its own use."""
    folder: Path = Path("work/online_rounds")
    """Where a single arm leaves what it found."""


def main(args: Args) -> None:
    """Each arm in a process of its own, then the table."""
    if args.one is not None:
        run(args, *args.one)
        return
    heads = ["rollout s", "judge s", "update s", "round s", "peak GB", "apart"]
    lines = [
        f"`python -m benchmarks.online_rounds {' '.join(sys.argv[1:])}`\n",
        row("method, arm", heads),
        "|" + "---|" * (len(heads) + 1),
    ]
    for method in args.methods:
        for side in ("plain", "SAIL"):
            words = [
                f"--{name}={getattr(args, name)}"
                for name in ("rounds", "base", "threads", "folder")
            ]
            subprocess.run(
                [sys.executable, "-m", "benchmarks.online_rounds", "--one", method, side, *words],
                check=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
            )  # fmt: skip
        ours, plain = (
            json.loads((args.folder / f"{method}-{side}.json").read_text())
            for side in ("SAIL", "plain")
        )
        for side, found in (("plain loop", plain), ("SAIL", ours)):
            cells = [f"{found[name]:.2f}" for name in ("rollout", "judge", "update", "round")]
            cells.append(f"{found['peak_gb']:.2f}")
            apart = agreement(args.folder, method) if side == "SAIL" else "-"
            lines.append(row(f"{method}, {side}", [*cells, apart]))
            print(lines[-1], flush=True)
    write_text(args.output, "\n".join(lines) + "\n")


def agreement(folder: Path, method: Method) -> str:
    """How far the two arms are apart: what was sampled in the first round, and what the weights became."""
    ours, plain = (load_file(folder / f"{method}-{side}.safetensors") for side in ("SAIL", "plain"))
    latents = float((ours["latents"] - plain["latents"]).abs().max())
    way = float((ours["way"] - plain["way"]).norm() / plain["way"].norm())
    return f"latents {latents:.0e}, {way:.1e} of the weights' way"


def run(args: Args, method: Method, side: Side) -> None:
    """One arm; its seconds a round, peak memory, first transitions and the way of its weights go to the folder."""
    choose_device(args.threads)
    settings = replace(METHODS[method], rounds=args.rounds)
    found, tensors = (ours if side == "SAIL" else plain)(args, settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    each = {name: value / args.rounds for name, value in found.items()}
    args.folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.folder / f"{method}-{side}.safetensors")
    text = json.dumps({**each, "round": sum(each.values()), "peak_gb": peak})
    (args.folder / f"{method}-{side}.json").write_text(text)


Found = tuple[dict[str, float], dict[str, Tensor]]
"""CPU seconds of all rounds by kind of work; 'latents' after the first round's steps, 'way' of the weights."""


def prompts_of(settings: OnlineSettings) -> list[tuple[str, str]]:
    """Evenly spaced captions that leave something open."""
    captions = [str(caption) for caption in open_captions()]
    count = settings.rounds * settings.prompts_per_update
    return [(f"{place:08x}", captions[place * len(captions) // count]) for place in range(count)]


# The product


class Timed(StepJudge):
    """A judge, and the seconds that it takes."""

    def __init__(self, judge: StepJudge) -> None:
        self.judge, self.seconds = judge, 0.0

    def __call__(
        self, clean: Tensor, prompts: Sequence[str], text: Conditioning, *, timestep: int,
        seeds: Sequence[int],
    ) -> np.ndarray:  # fmt: skip
        """See `StepJudge`."""
        started = time.process_time()
        scores = self.judge(clean, prompts, text, timestep=timestep, seeds=seeds)
        self.seconds += time.process_time() - started
        return scores


def ours(args: Args, settings: OnlineSettings) -> Found:
    """A training by the product's own loop."""
    model = load_model(ModelSettings(base=args.base, dtype="float32"), device=torch.device("cpu"))
    prompts = prompts_of(settings)
    asked = Asked(
        prompts=prompts, text=encode_captions(model, [text for _, text in prompts]),
        unconditional=model.unconditional(),
    )  # fmt: skip
    policy, reference = model.load_for_training(None, None, LoraSettings(), seed=0)
    start = [weight.detach().clone() for weight in policy.trainable()]
    judge = Timed(ImageJudge(model=model, score=load_scorer("total")))
    with tempfile.TemporaryDirectory() as work:
        training = OnlineTraining(
            model, policy, policy if settings.method == "ddpo" else reference, judge, asked, settings,
            seed=SEED, work=Path(work), identity="", processes=Processes(model.device),
            execution=Execution(save_minutes=10**9), prompts_per_batch=settings.prompts_per_update,
        )  # fmt: skip
        sampled, shown, rolled = training.sampled.sample, list[Shown](), [0.0]

        def sample(number: int, chains: Chains) -> Shown | None:
            started = time.process_time()
            found = sampled(number, chains)
            rolled[0] += time.process_time() - started
            assert found is not None
            shown.append(found)
            return found

        training.sampled.sample = sample  # type: ignore[method-assign]
        started = time.process_time()
        training.run()
        whole = time.process_time() - started
    found = {
        "rollout": rolled[0] - judge.seconds,
        "judge": judge.seconds,
        "update": whole - rolled[0],
    }
    way = torch.cat(
        [
            (weight.detach() - before).flatten()
            for weight, before in zip(policy.trainable(), start, strict=True)
        ]
    )
    return found, {"latents": shown[0].transitions.after.contiguous(), "way": way}


# The plain loop


@dataclass(frozen=True)
class Plain:
    """What a script has."""

    pipe: StableDiffusionPipeline
    scheduler: DDIMScheduler
    guidance: float
    text: Tensor
    """Row by row, of the prompts."""
    unconditional: Tensor

    def step(
        self, unet: Any, latents: Tensor, number: int, text: Tensor
    ) -> tuple[Tensor, float, Tensor]:
        """(mean, standard deviation, clean estimate) of diffusers' DDIM step with eta = 1."""
        timestep = self.scheduler.timesteps[number]
        both = torch.cat([self.unconditional.expand(len(latents), -1, -1), text])
        predicted = unet(torch.cat([latents, latents]), timestep, encoder_hidden_states=both).sample
        without, with_text = predicted.chunk(2)
        made = self.scheduler.step(
            without + self.guidance * (with_text - without), timestep, latents, eta=1.0,
            variance_noise=torch.zeros_like(latents),
        )  # fmt: skip
        before = timestep - 1000 // len(self.scheduler.timesteps)
        sigma = float(self.scheduler._get_variance(timestep, before)) ** 0.5
        return made.prev_sample, sigma, made.pred_original_sample

    def score(self, clean: Tensor, captions: Sequence[str]) -> np.ndarray:
        """The oracle's totals of decoded latents, by their 8-bit pixels."""
        images = self.pipe.vae.decode(clean / self.pipe.vae.config.scaling_factor).sample
        pixels = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return total((255 * pixels).round().astype(np.float32) / 255, captions).astype(np.float64)


def log_probability(sample: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """As the published codes: the mean over dimensions of the Gaussian's log-density."""
    density = -((sample - mean) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    return density.mean(dim=(1, 2, 3))


def plain(args: Args, settings: OnlineSettings) -> Found:
    """The same training by hand."""
    pipe = StableDiffusionPipeline.from_pretrained(args.base, safety_checker=None)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    scheduler.set_timesteps(settings.num_inference_steps)
    pipe.vae.requires_grad_(False)
    reference = pipe.unet
    policy = type(reference).from_pretrained(args.base, subfolder="unet")
    reference.requires_grad_(False)
    start = [weight.detach().clone() for weight in policy.parameters()]
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    prompts = prompts_of(settings)
    with torch.no_grad():
        text, unconditional = (
            pipe.encode_prompt(words, "cpu", 1, False)[0]
            for words in ([text for _, text in prompts], [""])
        )
    loop = Plain(pipe, scheduler, settings.guidance_scale, text, unconditional)
    asked = Asked(prompts=prompts, text=None, unconditional=None)  # type: ignore[arg-type]
    seconds = {"rollout": 0.0, "judge": 0.0, "update": 0.0}
    first: Tensor | None = None
    for number in range(1, settings.rounds + 1):
        started, judged = time.process_time(), seconds["judge"]
        sample = plain_pools if settings.method == "spo" else plain_chains
        items = sample(
            loop,
            policy,
            asked.of_round(number, settings.prompts_per_update, SEED),
            settings,
            seconds,
        )
        seconds["rollout"] += time.process_time() - started - (seconds["judge"] - judged)
        first = items.after if first is None else first
        started = time.process_time()
        for batch in batches(items, settings, seed_of(SEED, "batches", number)):
            optimizer.zero_grad()
            chosen = items.rows(batch)
            for each in range(settings.num_inference_steps):  # a scheduler's step has one timestep
                part = chosen.rows((chosen.number == each).nonzero()[:, 0])
                if len(part):
                    loss = plain_losses(loop, policy, reference, part, each, settings)
                    (loss.sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.gradient_clip)
            optimizer.step()
        seconds["update"] += time.process_time() - started
    assert first is not None
    way = torch.cat(
        [
            (weight.detach() - before).flatten()
            for weight, before in zip(policy.parameters(), start, strict=True)
        ]
    )
    return seconds, {"latents": first.contiguous(), "way": way}


def timed_scores(
    loop: Plain, clean: Tensor, captions: Sequence[str], seconds: dict[str, float]
) -> np.ndarray:
    """Scores, whose seconds are the judge's."""
    started = time.process_time()
    with torch.no_grad():
        scores = loop.score(clean, captions)
    seconds["judge"] += time.process_time() - started
    return scores


def noise(unet: Any, walks: Sequence[torch.Generator]) -> Tensor:
    """One noise for each generator, in its order."""
    side = unet.config.sample_size
    shape = (unet.config.in_channels, side, side)
    return torch.stack([torch.randn(shape, generator=walk) for walk in walks])


@torch.no_grad()
def plain_chains(
    loop: Plain, unet: Any, prompts: Sequence[Prompt], settings: OnlineSettings,
    seconds: dict[str, float],
) -> Transitions:  # fmt: skip
    """Whole chains of all prompts; for ddpo every step, for d3po those of the best and the worst."""
    size, steps = settings.candidates_per_prompt, settings.num_inference_steps
    owners = [prompt for prompt in prompts for _ in range(size)]
    seeds = [seed_of(prompt.seed, "chain", each) for prompt in prompts for each in range(size)]
    walks = [torch.Generator().manual_seed(seed) for seed in seeds]
    if settings.method == "d3po":  # all chains of a prompt begin with one noise
        latents = noise(unet, [torch.Generator().manual_seed(prompt.seed) for prompt in owners])
    else:
        latents = noise(unet, walks)
    captions = torch.tensor([prompt.caption for prompt in owners])
    moments, probabilities = [latents], []
    for number in range(steps):
        mean, sigma, _ = loop.step(unet, latents, number, loop.text[captions])
        latents = mean + sigma * noise(unet, walks)
        probabilities.append(log_probability(latents, mean, sigma))
        moments.append(latents)
    scores = timed_scores(loop, latents, [prompt.prompt for prompt in owners], seconds)
    before, after = torch.stack(moments[:-1], dim=1), torch.stack(moments[1:], dim=1)
    if settings.method == "ddpo":
        advantages = torch.from_numpy((scores - scores.mean()) / (scores.std() + 1e-6)).float()
        return Transitions(
            captions.repeat_interleave(steps), torch.arange(steps).repeat(len(owners)),
            torch.arange(len(owners)).repeat_interleave(steps),
            before.flatten(0, 1)[:, None], after.flatten(0, 1)[:, None],
            torch.stack(probabilities, dim=1).flatten(),
            advantages.clamp(-5, 5).repeat_interleave(steps),
        )  # fmt: skip
    pairs = []
    for place, prompt in enumerate(prompts):
        sides = place * size + torch.tensor(extremes(scores[place * size : (place + 1) * size]))
        pairs += [
            pair(prompt, place, each, before[sides, each], after[sides, each])
            for each in range(steps)
        ]
    return Transitions.joined(pairs)


@torch.no_grad()
def plain_pools(
    loop: Plain, unet: Any, prompts: Sequence[Prompt], settings: OnlineSettings,
    seconds: dict[str, float],
) -> Transitions:  # fmt: skip
    """SPO's pools, prompt by prompt: each step drawn for several candidates, of which a random one goes on."""
    found = []
    for place, prompt in enumerate(prompts):
        walk = torch.Generator().manual_seed(prompt.seed)
        latents = noise(unet, [walk])
        moved: tuple[int, Tensor, Tensor] | None = None
        for number in range(settings.num_inference_steps):
            text = loop.text[prompt.caption].expand(len(latents), -1, -1)
            mean, sigma, clean = loop.step(unet, latents, number, text)
            if moved is not None:
                found.append(compared(loop, prompt, place, moved, clean, seconds))
                chooser = torch.Generator().manual_seed(seed_of(prompt.seed, "next", number))
                chosen = int(torch.randint(len(latents), (1,), generator=chooser))
                latents, mean = latents[[chosen]], mean[[chosen]]
            is_pool = number >= settings.divert_step
            size = settings.candidates_per_prompt if is_pool else 1
            after = mean + sigma * noise(unet, [walk] * size)
            moved = (number, latents, after) if is_pool else None
            latents = after
        assert moved is not None
        found.append(compared(loop, prompt, place, moved, latents, seconds))
    return Transitions.joined(found)


def compared(
    loop: Plain, prompt: Prompt, place: int, moved: tuple[int, Tensor, Tensor], clean: Tensor,
    seconds: dict[str, float],
) -> Transitions:  # fmt: skip
    """The steps of the best and the worst candidate."""
    number, before, after = moved
    scores = timed_scores(loop, clean, [prompt.prompt] * len(clean), seconds)
    sides = extremes(scores)
    return pair(prompt, place, number, before.expand(2, -1, -1, -1), after[sides])


def extremes(scores: np.ndarray) -> list[int]:
    """The best and the worst."""
    return [int(scores.argmax()), len(scores) - 1 - int(scores[::-1].argmin())]


def pair(prompt: Prompt, place: int, number: int, before: Tensor, after: Tensor) -> Transitions:
    """One pair of steps."""
    nothing = torch.zeros(1)
    return Transitions(
        torch.tensor([prompt.caption]), torch.tensor([number]), torch.tensor([place]),
        before[None], after[None], nothing, nothing,
    )  # fmt: skip


def plain_losses(
    loop: Plain,
    policy: Any,
    reference: Any,
    items: Transitions,
    number: int,
    settings: OnlineSettings,
) -> Tensor:
    """The published losses of items that take one step of the chain."""
    sides = items.before.shape[1]
    before, after = (each.transpose(0, 1).flatten(0, 1) for each in (items.before, items.after))
    text = loop.text[items.caption.repeat(sides)]
    mean, sigma, _ = loop.step(policy, before, number, text)
    now = log_probability(after, mean, sigma)
    if settings.method == "ddpo":
        ratio = torch.exp(now - items.log_probability)
        low, high = 1 - settings.ratio_clip, 1 + settings.ratio_clip
        return torch.maximum(-items.advantage * ratio, -items.advantage * ratio.clamp(low, high))
    with torch.no_grad():
        mean, sigma, _ = loop.step(reference, before, number, text)
        then = log_probability(after, mean, sigma)
    ratio = torch.exp(now - then).clamp(1 - settings.ratio_clip, 1 + settings.ratio_clip)
    winner, loser = torch.log(ratio).chunk(2)
    return -torch.nn.functional.logsigmoid(settings.preference_beta * (winner - loser))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
