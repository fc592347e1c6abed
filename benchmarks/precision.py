r"""How the judge's precision moves its rankings: each way to score beside exact float32.

Example (the embedded world's own policy 0 and candidates; then a random model of middle size):
    make demo
    python -m benchmarks.precision --run results/shapes --output benchmarks/precision.md

The policies lie on the line from the base to a trained one: a policy that is nearer to the base has
smaller rewards, and rounding is more of them. A way agrees with float32 on a prompt where it names the
same best and the same worst candidate. TF32 exists on GPUs only; here it is imitated: both factors of
every product lose the mantissa's last 13 bits, rounded to nearest, and sums stay in float32.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stages.core.artifacts.files import write_text
from stages.core.artifacts.schemas import CANDIDATES
from stages.core.artifacts.tables import read_table
from stages.core.method.derivative import Derivative
from stages.core.method.noising import generator, reward_draws
from stages.core.method.rewards import implicit_reward, share_moved
from stages.core.method.scoring import Difference, Judge, draw_errors
from stages.core.method.secant import Secant
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.models.policy import Policy
from stages.core.policies.encoding import latents_tensor
from stages.core.policies.loading import RewardsBy
from tests.tiny_models import middle_size_sd15

NUM_DRAWS = 10
HEAD = """# The judge's precision

    python -m benchmarks.precision {flags}

On two CPU cores (x86-64), after `make demo`. A policy lies on the line from the base to a trained one, at 3, 1, 0.3
and 0.1 of its distance. `difference` subtracts the errors of two predictions (Eq. 8); `secant` those of two
models further apart on the same line; `derivative` is taken half way between (docs/method.md). TF32 is imitated.
What precisions and the derivative cost on a GPU is in [gpu.md](gpu.md); a secant costs what a difference costs.
"""
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Each way to score beside exact float32."""

    run: Path = Path("results/shapes")
    """A finished run of the embedded world: its policy 0 and its candidates of iteration 1."""
    base: str = "stages/shapes/pipeline"
    """The run's base model."""
    prompts: int = 50
    """How many of its prompts; 0 leaves it out."""
    distances: tuple[float, ...] = (3.0, 1.0, 0.3, 0.1)
    """How far the judged policies are from the base, in parts of the trained one's distance."""
    middle_prompts: int = 6
    """Prompts of the random model of middle size; 0 leaves it out."""
    only: tuple[str, ...] = ()
    """Only ways with these names, and float32; none is all."""
    threads: int = 2
    """CPU threads."""
    output: Path = Path("benchmarks/precision.md")
    """Where the table goes (Markdown)."""


@dataclass(frozen=True)
class Way:
    """A precision to score in."""

    name: str
    weights: torch.dtype
    arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext
    rewards_by: RewardsBy = "difference"
    """How the reward is had of two models."""


def tf32(value: Tensor) -> Tensor:
    """Float32 numbers with TF32's ten bits of mantissa, rounded to nearest."""
    bits = value.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


FACTORS = {"linear": 2, "conv2d": 2, "scaled_dot_product_attention": 3, "bmm": 2}
"""How many of a function's first arguments are multiplied with each other."""


class Products(TorchFunctionMode):
    """Every product of float32 tensors with its factors, and perhaps its result, rounded."""

    def __init__(
        self, factors: Callable[[Tensor], Tensor], result: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.factors, self.result = factors, result

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Round an attention's query, key and value too; its weights within stay exact."""
        number = FACTORS.get(getattr(func, "__name__", ""), 0)
        rounded = [self.factors(value.contiguous()) for value in args[:number]]
        result = func(*rounded, *args[number:], **(kwargs or {}))
        return self.result(result) if number and self.result else result


def float16(value: Tensor) -> Tensor:
    """Float32 numbers that float16 has."""
    return value.half().float()


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """As diffusers' training scripts do it."""
    return torch.autocast("cpu", dtype)


WAYS = (
    Way("bfloat16", torch.bfloat16),
    Way("bfloat16 by autocast, float32 weights", torch.float32, partial(autocast, torch.bfloat16)),
    Way("float16", torch.float16),
    Way("float16 by autocast, float32 weights", torch.float32, partial(autocast, torch.float16)),
    Way("float16 products, the rest float32", torch.float32, partial(Products, float16, float16)),
    Way("TF32 products, the rest float32", torch.float32, partial(Products, tf32)),
    Way("secant in bfloat16", torch.bfloat16, rewards_by="secant"),
    Way("secant in float16", torch.float16, rewards_by="secant"),
    Way("secant, TF32 products", torch.float32, partial(Products, tf32), rewards_by="secant"),
    Way("derivative in bfloat16", torch.bfloat16, rewards_by="derivative"),
    Way("derivative in float16", torch.float16, rewards_by="derivative"),
    Way("derivative in float32", torch.float32, rewards_by="derivative"),
    Way("float32", torch.float32),
)


@dataclass(frozen=True)
class Question:
    """What is judged: the candidates of some prompts."""

    prompts: list[str]
    latents: list[Tensor]


def rewards(
    settings: ModelSettings, weights: Weights, base: Weights, question: Question, way: Way
) -> np.ndarray:
    """The reward of each candidate of each prompt."""
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
    model = load_model(
        ModelSettings(base=settings.base, dtype=names[way.weights]),  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )
    reference, policy = model.load_denoiser(), model.load_denoiser()
    policy.network.load_state_dict({k: v.to(way.weights) for k, v in weights.items()})
    judge: Judge = Difference(policy, reference)
    with way.arithmetic():
        if way.rewards_by == "derivative":
            judge = Derivative.between(reference.network, weights, base)
        elif way.rewards_by == "secant":
            judge = Secant.between(model, weights, base)
    found = []
    texts = [model.encode_text([prompt]) for prompt in question.prompts]
    for text, prompt, latents in zip(texts, question.prompts, question.latents, strict=True):
        draws = reward_draws(
            seed_of(0, "precision", prompt),
            num_draws=NUM_DRAWS,
            num_timesteps=model.num_timesteps,
            latents_shape=model.latents_shape,
        )
        with way.arithmetic():
            errors = draw_errors(model, judge, latents, text, draws)
        found.append(
            implicit_reward(
                policy_errors=errors.policy.numpy(), reference_errors=errors.reference.numpy()
            ).reward
        )
    return np.array(found)


def of_run(args: Args) -> tuple[ModelSettings, Weights, Weights, Question]:
    """The base's and policy 0's weights, and the candidates of iteration 1."""
    settings = ModelSettings(base=args.base, dtype="float32")
    model = load_model(settings, device=torch.device("cpu"))
    table = read_table(
        args.run / "iter01" / "candidates" / "shard-0.parquet",
        CANDIDATES,
        ["prompt_id", "prompt", "latents"],
    )
    by_prompt: dict[str, list[int]] = {}
    for row, name in enumerate(table.column("prompt_id").to_pylist()):
        by_prompt.setdefault(name, []).append(row)
    chosen = list(by_prompt.values())[: args.prompts]
    prompts = table.column("prompt").to_pylist()
    question = Question(
        prompts=[prompts[rows[0]] for rows in chosen],
        latents=[
            latents_tensor(table.take(rows).column("latents"), model.latents_shape, str(args.run))
            for rows in chosen
        ],
    )
    base = weights_of(model.load_denoiser())
    trained = weights_of(model.load_denoiser(Policy(args.run / "iter00" / "policy")))
    return settings, base, trained, question


def of_middle_size(args: Args, folder: Path) -> tuple[ModelSettings, Weights, Weights, Question]:
    """A random model of middle size; its "trained" weights follow the gradient of one reward."""
    settings = ModelSettings(base=str(middle_size_sd15(folder)), dtype="float32")
    model = load_model(settings, device=torch.device("cpu"))
    prompts = [f"picture number {number}" for number in range(args.middle_prompts)]
    latents = [
        torch.randn((8, *model.latents_shape), generator=generator(seed_of(1, prompt)))
        for prompt in prompts
    ]
    base = weights_of(model.load_denoiser())
    return settings, base, trained_a_little(model), Question(prompts, latents)


def trained_a_little(model: DiffusionModel, steps: int = 8, rate: float = 6e-6) -> Weights:
    """The base after a few of Adam's steps towards some latents: a distance of about 5e-5 a weight."""
    denoiser = model.load_denoiser()
    optimizer = torch.optim.Adam(denoiser.trainable(), lr=rate)
    text = model.encode_text(["a picture"])
    for step in range(steps):
        latents, noise = torch.randn((2, 4, *model.latents_shape), generator=generator(step))
        timesteps = torch.randint(0, model.num_timesteps, (4,), generator=generator(step))
        noised = model.add_noise(latents, noise, timesteps)
        prediction = model.predict(denoiser, noised, timesteps, text.repeat(4))
        loss = (prediction - model.target(latents, noise, timesteps)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weights_of(denoiser)


def weights_of(denoiser: Denoiser) -> Weights:
    """A copy of its weights."""
    return {name: value.detach().clone() for name, value in denoiser.network.state_dict().items()}


def between(base: Weights, trained: Weights, share: float) -> Weights:
    """On the line from the base to the trained weights."""
    return {name: base[name] + share * (trained[name] - base[name]) for name in base}


def agreement(found: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """The share of prompts with the same best and worst; what rounding moves, in spreads of the rewards."""
    same = (found.argmax(1) == exact.argmax(1)) & (found.argmin(1) == exact.argmin(1))
    return float(same.mean()), share_moved(found, exact)


def table_of(
    title: str, parts: tuple[ModelSettings, Weights, Weights, Question], args: Args
) -> list[str]:
    """The rows of one model."""
    settings, base, trained, question = parts
    columns = " | ".join(f"{share:g}" for share in args.distances)
    lines = [
        f"## {title}",
        "",
        f"{len(question.prompts)} prompts, {len(question.latents[0])} candidates each, {NUM_DRAWS} draws. In "
        "a cell: prompts with float32's best and worst; rounding's share of the rewards' spread.",
        "",
        f"| way to score | {columns} |",
        "|---" * (len(args.distances) + 1) + "|",
    ]
    exact: dict[float, np.ndarray] = {}
    rows = []
    chosen = [w for w in WAYS if not args.only or w.name in (*args.only, "float32")]
    for way in reversed(chosen):
        cells = []
        for share in args.distances:
            found = rewards(settings, between(base, trained, share), base, question, way)
            exact.setdefault(share, found)
            same, rounding = agreement(found, exact[share])
            cells.append(f"{same:.0%}, {rounding:.3f}")
        rows.append(f"| {way.name} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return [*lines, *reversed(rows), ""]


def main(args: Args) -> None:
    """Score with each way, and write the tables."""
    torch.set_num_threads(args.threads)
    lines = [HEAD.format(flags=shlex.join(sys.argv[1:]))]
    if args.prompts:
        lines += table_of("The embedded world", of_run(args), args)
    if args.middle_prompts:
        with tempfile.TemporaryDirectory() as folder:
            parts = of_middle_size(args, Path(folder))
            lines += table_of("A random model of middle size", parts, args)
    write_text(args.output, "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
