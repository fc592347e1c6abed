"""One Diffusion-DPO training loop, for the seed training and for every update."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.errors import UserError
from stages.core.models import Conditioning, Denoiser, StableDiffusion
from stages.core.noising import Draws, training_draws
from stages.core.objective import denoising_error, dpo_loss, preference_logit
from stages.core.runtime import progress
from stages.core.seeding import seed_of

log = logging.getLogger(__name__)


class TrainingError(UserError):
    """A training that cannot go on; the message names the step, the loss and the last good state."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Everything about the optimisation that changes its result."""

    dpo_beta: float
    """Strength of the pull towards the reference, with mean errors (paper: 5000)."""
    learning_rate: float
    """Of AdamW, after the warmup."""
    batch_pairs: int
    """Pairs per optimizer step."""
    passes: float
    """Passes over the pairs; the number of steps is passes x pairs / batch_pairs, rounded up."""
    warmup_share: float
    """Share of the steps over which the learning rate rises from 0, linearly."""
    gradient_clip: float
    """Largest norm of the gradient."""
    weight_decay: float
    """Of AdamW."""
    caption_dropout: float
    """Share of pairs that are trained on with an empty caption, the same for both images."""


@dataclass(frozen=True)
class EncodedPairs:
    """Preference pairs ready for training: latents, and which caption each pair has."""

    winner: Float[Tensor, "pair channel height width"]
    loser: Float[Tensor, "pair channel height width"]
    caption: Int[Tensor, " pair"]
    """Row of `text`."""
    text: Conditioning
    """Conditioning of each different caption; the last row is the empty caption's."""

    def __len__(self) -> int:
        return len(self.winner)


@dataclass(frozen=True)
class Step:
    """What one optimizer step saw; see schemas.TRAINING."""

    step: int
    loss: float
    implicit_accuracy: float
    logit: float
    winner_error: float
    loser_error: float
    gradient_norm: float
    learning_rate: float
    pairs_per_second: float


def train_dpo(
    model: StableDiffusion,
    policy: Denoiser,
    reference: Denoiser,
    pairs: EncodedPairs,
    settings: TrainingSettings,
    *,
    seed: int,
    work: Path,
    identity: str,
    save_every: int,
) -> list[Step]:
    """Train `policy` in place on the pairs; one record per step.

    The state is saved in `work` every `save_every` steps under `identity`: the same training,
    started again after an interruption, continues from there and ends with the same weights.
    TrainingError if the loss or the gradient stops being finite; the state then stays where it was.
    Paper: SAIL Alg. 1; Diffusion-DPO's loss on mean errors.
    """
    total = num_steps(len(pairs), settings)
    policy.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    state = _State(work, identity, policy, optimizer)
    steps = state.restore()
    order = _order(len(pairs), total * settings.batch_pairs, seed)
    for number in progress(range(len(steps) + 1, total + 1), "training", "pairs",
                           settings.batch_pairs):  # fmt: skip
        started = time.monotonic()
        rate = _learning_rate(number, total, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = order[(number - 1) * settings.batch_pairs : number * settings.batch_pairs]
        step_seed = seed_of(seed, "draws", number)
        draws = training_draws(
            step_seed,
            num_pairs=len(rows),
            num_timesteps=model.num_timesteps,
            latents_shape=tuple(pairs.winner.shape[1:]),
        )
        measures = batch_loss(model, policy, reference, pairs, rows, draws, settings, step_seed)
        optimizer.zero_grad(set_to_none=True)
        measures["loss"].backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.gradient_clip)
        _refuse_not_finite(number, measures["loss"], norm, state)
        optimizer.step()
        values = {name: float(value.detach()) for name, value in measures.items()}
        speed = len(rows) / (time.monotonic() - started)
        steps.append(
            Step(
                step=number,
                gradient_norm=float(norm),
                learning_rate=rate,
                pairs_per_second=speed,
                **values,
            )
        )
        if number % save_every == 0 and number < total:
            state.save(steps)
    policy.eval().requires_grad_(False)
    return steps


def batch_loss(
    model: StableDiffusion,
    policy: Denoiser,
    reference: Denoiser,
    pairs: EncodedPairs,
    rows: Int[Tensor, " chosen"],
    draws: Draws,
    settings: TrainingSettings,
    dropout_seed: int,
) -> dict[str, Tensor]:
    """The mean loss of some pairs and what is logged with it; winner and loser share their draw."""
    captions = pairs.caption[rows]
    if settings.caption_dropout > 0:
        chance = torch.rand(
            len(rows), generator=torch.Generator().manual_seed(seed_of(dropout_seed, "dropout"))
        )
        captions = torch.where(
            chance < settings.caption_dropout, len(pairs.text.text) - 1, captions
        )
    context = pairs.text.rows(captions.to(pairs.text.text.device)).repeat(2)
    device, dtype = model.device, model.dtype
    noise = draws.noise.to(device, dtype).repeat(2, 1, 1, 1)
    timesteps = draws.timesteps.to(device).repeat(2)
    latents = torch.cat([pairs.winner[rows], pairs.loser[rows]]).to(device, dtype)
    noised = model.add_noise(latents, noise, timesteps)
    policy_error = denoising_error(model.predict(policy, noised, timesteps, context), noise)
    with torch.no_grad():
        reference_error = denoising_error(
            model.predict(reference, noised, timesteps, context), noise
        )
    policy_error_w, policy_error_l = policy_error.chunk(2)
    reference_error_w, reference_error_l = reference_error.chunk(2)
    logit = preference_logit(
        policy_error_w=policy_error_w,
        policy_error_l=policy_error_l,
        reference_error_w=reference_error_w,
        reference_error_l=reference_error_l,
        dpo_beta=settings.dpo_beta,
    )
    return {
        "loss": dpo_loss(logit).mean(),
        "implicit_accuracy": (logit > 0).float().mean(),
        "logit": logit.mean(),
        "winner_error": (policy_error_w - reference_error_w).mean(),
        "loser_error": (policy_error_l - reference_error_l).mean(),
    }


def num_steps(num_pairs: int, settings: TrainingSettings) -> int:
    """Optimizer steps of a training; at least one."""
    return max(1, math.ceil(settings.passes * num_pairs / settings.batch_pairs))


def _learning_rate(step: int, total: int, settings: TrainingSettings) -> float:
    """Linear warmup over the first share of the steps, then constant. Paper: as Diffusion-DPO."""
    warmup = math.ceil(settings.warmup_share * total)
    return settings.learning_rate * min(1.0, step / warmup if warmup else 1.0)


def _order(num_pairs: int, num_wanted: int, seed: int) -> Int[Tensor, " row"]:
    """Rows to train on, one shuffled pass after the other."""

    def shuffled_passes() -> Iterator[np.ndarray]:
        for number in range(math.ceil(num_wanted / num_pairs)):
            yield np.random.default_rng(seed_of(seed, "order", number)).permutation(num_pairs)

    return torch.from_numpy(np.concatenate(list(shuffled_passes()))[:num_wanted])


def _refuse_not_finite(step: int, loss: Tensor, norm: Tensor, state: _State) -> None:
    if torch.isfinite(loss) and torch.isfinite(norm):
        return
    kept = f"the state of step {state.saved_step} is kept in {state.folder}"
    if state.saved_step == 0:
        kept = "no state had been saved yet"
    raise TrainingError(
        f"training stopped at step {step}: loss {float(loss.detach())}, gradient norm {float(norm)}. "
        f"No policy was written; {kept}. Lower learning_rate or dpo_beta, or use dtype float32, "
        "then run again."
    )


class _State:
    """The training state on disk: outside any declared output, and only ever used by its owner."""

    def __init__(
        self, folder: Path, identity: str, policy: Denoiser, optimizer: torch.optim.Optimizer
    ) -> None:
        self.folder, self.identity = folder, identity
        self.policy, self.optimizer = policy, optimizer
        self.saved_step = 0

    def restore(self) -> list[Step]:
        """Load a saved state of the same identity; its records, or none."""
        record = self.folder / "state.json"
        if not record.is_file():
            return []
        saved = json.loads(record.read_text())
        if saved["identity"] != self.identity:
            log.info("%s holds the state of another training; starting afresh", self.folder)
            shutil.rmtree(self.folder)
            return []
        state = torch.load(self.folder / saved["weights"], weights_only=True)
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        steps = [Step(**step) for step in saved["steps"]]
        self.saved_step = len(steps)
        log.info("continuing from step %d (%s)", self.saved_step, self.folder)
        return steps

    def save(self, steps: Sequence[Step]) -> None:
        """Save weights, optimizer and records; the record names the weights and comes last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{len(steps):06d}.pt"
        torch.save(
            {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()},
            self.folder / f"{name}.part",
        )
        (self.folder / f"{name}.part").replace(self.folder / name)
        record = {
            "identity": self.identity,
            "weights": name,
            "steps": [asdict(step) for step in steps],
        }
        part = self.folder / "state.json.part"
        part.write_text(json.dumps(record))
        part.replace(self.folder / "state.json")
        for old in self.folder.glob("step-*.pt*"):
            if old.name != name:
                old.unlink()
        self.saved_step = len(steps)
