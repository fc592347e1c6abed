r"""What the reference costs a training, and what could be saved of it without moving a number.

Example (two CPU cores, some minutes):
    python -m benchmarks.reference --output benchmarks/reference.md

The reference predicts for every (timestep, noise) that the policy is trained on. These are drawn anew at every step
and in every pass, so that no error of it is used twice: to compute them ahead of a training would be the same work.
What remains is measured here: whether a larger batch without gradients makes it cheaper, and the held-out curve,
whose draws are the same at every step. Times are CPU seconds of this process, which other work on the machine
moves little; the ways take turns, and figures are medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from stages.core.artifacts.files import write_text
from stages.core.method.noising import Draws, generator, training_draws
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.encoding import EncodedPairs, encode_captions
from stages.core.training.held_out import HeldOut
from stages.core.training.pair_losses import batch_loss, pair_errors
from stages.core.training.settings import TrainingSettings
from tests import tiny_models

SETTINGS = TrainingSettings(
    dpo_beta=5000.0, learning_rate=1e-5, batch_pairs=4, passes=1.0, warmup_share=0.0, gradient_clip=1.0,
    weight_decay=0.01, caption_dropout=0.0,
)  # fmt: skip
WORDS = """
- A training draws timestep and noise anew at every step and in every pass: each error of the reference is used once.
  Errors that are computed ahead would be the same number of predictions. Training on the draws by which pairs were
  chosen would save them, but would train on the luck of the choice: another recipe.
- Ahead of a training the reference could predict in larger batches. The table says what that would save of its part of
  a step. It would move every number by rounding, so it is not done.
- The held-out curve's draws are the same at every step. From its second score on the reference is not asked again;
  the curve is the same to the bit.
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """What the reference costs a training."""

    suites: tuple[Literal["embedded", "middle"], ...] = ("embedded", "middle")
    """The embedded world's model; SD1.5's shape made narrow."""
    micro_batch_pairs: int = 4
    """Pairs that go through the network at once."""
    repeats: int = 5
    """Turns of each way, after one that is not timed."""
    output: Path = Path("benchmarks/reference.md")
    """Where the table goes (Markdown)."""


def main(args: Args) -> None:
    """Measure every suite, full and LoRA, and write the table."""
    torch.set_num_threads(1)
    lines = [
        f"Made by `python -m benchmarks.reference`: CPU seconds a pair on one thread, float32, {args.micro_batch_pairs} "
        "pairs at once, medians. Held-out pairs are scored with one draw each.\n",
        "| model | training | policy and reference, a step | reference alone | in a batch four times as large | a pair of "
        "the held-out curve | from the second score on | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for suite in args.suites:
            base = Path("stages/shapes/pipeline") if suite == "embedded" else (
                tiny_models.middle_size_sd15(Path(folder)))  # fmt: skip
            model = load_model(
                ModelSettings(base=str(base), dtype="float32"), device=torch.device("cpu")
            )
            for rank in (0, 8):
                found = medians(ways(model, rank, args.micro_batch_pairs), args.repeats)
                step, first, later = found["step"], found["first score"], found["later score"]
                alone, large = found["reference"], found["reference, large"]
                lines.append(
                    f"| {suite} | {f'LoRA {rank}' if rank else 'full'} | {step:.4f} | {alone:.4f} ({alone / step:.0%}) | "
                    f"{large:.4f} ({large / alone:.2f} of it) | {first:.4f} | {later:.4f} | {first / later:.2f} |"
                )
    text = "\n".join(lines) + "\n" + WORDS
    write_text(args.output, text)
    print(text)


def random_pairs(model: DiffusionModel, count: int) -> EncodedPairs:
    """Pairs of noise with one caption."""
    latents = torch.randn((2, count, *model.latents_shape), generator=generator(0))
    return EncodedPairs(
        winner=latents[0],
        loser=latents[1],
        caption=torch.zeros(count, dtype=torch.int64),
        text=encode_captions(model, ["a cat", ""]),
        winner_geometry=model.native_geometry(count),
        loser_geometry=model.native_geometry(count),
    )


def ways(model: DiffusionModel, rank: int, micro: int) -> dict[str, Callable[[], float]]:
    """What is timed: each returns CPU seconds a pair."""
    lora = LoraSettings(rank=rank, alpha=8.0)
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    policy.trainable()
    pairs = random_pairs(model, 4 * micro)
    held_out = HeldOut(pairs=pairs, num_draws=1, every_steps=1, seed=1, rows_per_batch=micro)
    draws = training_draws(
        2,
        num_pairs=len(pairs),
        num_timesteps=model.num_timesteps,
        latents_shape=model.latents_shape,
    )

    def some(count: int) -> tuple[torch.Tensor, Draws, torch.Tensor]:
        rows = torch.arange(count)
        return rows, Draws(draws.timesteps[:count], draws.noise[:count]), torch.zeros(count).bool()

    def step() -> None:
        rows, drawn, kept = some(micro)
        loss = batch_loss(model, policy, reference, pairs, rows, drawn, SETTINGS, kept)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]

    def errors(count: int) -> None:
        """One frozen network without gradients."""
        rows, drawn, kept = some(count)
        with torch.no_grad():
            pair_errors(model, reference, None, pairs, rows, drawn, kept, SETTINGS)

    def score(fresh: bool) -> None:
        asked = replace(held_out) if fresh else held_out
        asked.score(model, policy, reference, SETTINGS, step=0)

    return {
        "step": lambda: seconds(step, micro),
        "reference": lambda: seconds(lambda: errors(micro), micro),
        "reference, large": lambda: seconds(lambda: errors(4 * micro), 4 * micro),
        "first score": lambda: seconds(lambda: score(True), len(pairs)),
        "later score": lambda: seconds(lambda: score(False), len(pairs)),
    }


def seconds(work: Callable[[], None], num_pairs: int) -> float:
    """CPU seconds of a call, by pair."""
    started = time.process_time()
    work()
    return (time.process_time() - started) / num_pairs


def medians(arms: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of each arm; the arms take turns."""
    turns = [{name: arm() for name, arm in arms.items()} for _ in range(1 + repeats)][1:]
    return {name: statistics.median(turn[name] for turn in turns) for name in arms}


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
