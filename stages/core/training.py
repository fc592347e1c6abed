"""One Diffusion-DPO training loop, for the seed training and for every update."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.core.early_stopping import BestWeights, Score, best_score
from stages.core.errors import UserError
from stages.core.models import Conditioning, Denoiser, DiffusionModel
from stages.core.noising import Draws, training_draws
from stages.core.objective import (
    LOSSES,
    WITHOUT_REFERENCE,
    LossName,
    LossSettings,
    PairErrors,
    denoising_error,
    preference_logit,
)
from stages.core.optimizers import OptimizerName, make_optimizer
from stages.core.processes import Processes
from stages.core.runtime import progress
from stages.core.seeding import seed_of
from stages.core.stopping import STOP, Stopped
from stages.core.training_state import TrainingState

log = logging.getLogger(__name__)

FIRST_SCALE = 1024.0
"""Of float16's loss: dpo_beta makes gradients large already, so less than torch's 65536."""


class TrainingError(UserError):
    """A training that cannot go on; the message names the step, the loss and the last good state."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Everything about the optimisation that changes its result."""

    dpo_beta: float
    """Strength of the pull towards the reference, with mean errors (paper: 5000)."""
    learning_rate: float
    """Of the optimizer, after the warmup."""
    batch_pairs: int
    """Pairs per optimizer step."""
    passes: float
    """Passes over the pairs; the number of steps is passes x pairs / batch_pairs, rounded up."""
    warmup_share: float
    """Share of the steps over which the learning rate rises from 0, linearly."""
    gradient_clip: float
    """Largest norm of the gradient."""
    weight_decay: float
    """Of the optimizer."""
    caption_dropout: float
    """Share of pairs that are trained on with an empty caption, the same for both images."""
    loss: LossName = "sigmoid"
    """'sigmoid' (paper), 'ipo', or 'mapo' (no reference; Table 1's baseline)."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong (cDPO, with the sigmoid loss); 0 trusts them all (paper)."""
    optimizer: OptimizerName = "adamw"
    """'adamw' (paper, SD1.5), 'adafactor' (paper, SDXL) or 'adamw8bit' (bitsandbytes)."""
    ema_decay: float = 0.0
    """Decay of the average of the weights that becomes the policy; 0 takes the last ones (paper)."""
    stop_after_no_gain: int = 0
    """Held-out scores in a row without a gain that end the training, with the best-scored weights;
    0 trains to the end and keeps the last (paper)."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a training runs; changes its result by rounding at most."""

    micro_batch_pairs: int | None = None
    """Pairs that go through the network at once; gradients are accumulated over the batch."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    save_every: int = 50
    """Steps between two saved states."""


@dataclass(frozen=True)
class EncodedPairs:
    """Preference pairs ready for training: latents, and which caption each pair has."""

    winner: Float[Tensor, "pair channel height width"]
    loser: Float[Tensor, "pair channel height width"]
    caption: Int[Tensor, " pair"]
    """Row of `text`."""
    text: Conditioning
    """Conditioning of each different caption; the last row is the empty caption's."""
    winner_geometry: Int[Tensor, "pair six"]
    """Original height and width, top and left of the crop, target height and width, in pixels."""
    loser_geometry: Int[Tensor, "pair six"]
    """The loser's."""

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
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    pairs: EncodedPairs,
    settings: TrainingSettings,
    *,
    seed: int,
    work: Path,
    identity: str,
    processes: Processes,
    execution: Execution,
    held_out: HeldOut | None = None,
) -> tuple[list[Step], list[Progress]]:
    """Train `policy` in place on the pairs; one record per step, and the held-out curve.

    The state is saved in `work` every `save_every` steps under `identity`: the same training,
    started again after an interruption, continues from there and ends with the same weights.
    Several processes share each batch; what a pair draws does not depend on how many there are.
    TrainingError if the loss or the gradient stops being finite; the state then stays where it was.
    Paper: SAIL Alg. 1; Diffusion-DPO's loss on mean errors.
    """
    _refuse_unscored_stop(settings, held_out)
    total = num_steps(len(pairs), settings)
    parameters = policy.trainable()
    if execution.gradient_checkpointing:
        policy.network.enable_gradient_checkpointing()
    optimizer = make_optimizer(
        settings.optimizer,
        parameters,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    average = EMAModel(parameters, decay=settings.ema_decay) if settings.ema_decay > 0 else None
    scaler = torch.amp.GradScaler(
        model.device.type, init_scale=FIRST_SCALE, enabled=model.dtype == torch.float16
    )
    best = BestWeights(parameters, settings.stop_after_no_gain)
    state = TrainingState(work, identity, policy, optimizer, scaler, average, best)
    records = state.restore()
    steps = [Step(**step) for step in records["steps"]]
    curve = [Progress(**point) for point in records["curve"]]
    processes.wrap(policy)
    order = _order(len(pairs), total * settings.batch_pairs, seed)
    if held_out is not None and execution.micro_batch_pairs is not None:
        fewer = min(held_out.rows_per_batch, execution.micro_batch_pairs)
        held_out = replace(held_out, rows_per_batch=fewer)
    if held_out is not None and not curve:
        curve.append(held_out.score(model, policy, reference, settings, step=0))
        best.note(_scores(curve))
    for number in progress(range(len(steps) + 1, total + 1), "training", "pairs",
                           settings.batch_pairs):  # fmt: skip
        started = time.monotonic()
        rate = _learning_rate(number, total, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = order[(number - 1) * settings.batch_pairs : number * settings.batch_pairs]
        step_seed = seed_of(seed, "draws", number)
        optimizer.zero_grad(set_to_none=True)
        measures = _accumulate(
            model, policy, reference, pairs, rows, settings, step_seed,
            processes, scaler, execution.micro_batch_pairs,
        )  # fmt: skip
        if measures is None:
            _stop(steps, curve, state, processes)
        asked = torch.tensor(float(STOP.is_asked), device=processes.device)
        values = processes.mean({**measures, "asked": asked})
        is_asked = values.pop("asked") > 0  # by one of the processes: all stop together
        scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip))
        _refuse_not_finite(number, values["loss"], norm, scaler, state)
        scaler.step(optimizer)
        scaler.update()
        if average is not None:
            average.step(parameters)
        speed = len(rows) / (time.monotonic() - started)
        steps.append(
            Step(
                step=number,
                gradient_norm=norm,
                learning_rate=rate,
                pairs_per_second=speed,
                **values,
            )
        )
        processes.track(asdict(steps[-1]), number)
        if held_out is not None and (number % held_out.every_steps == 0 or number == total):
            curve.append(held_out.score(model, policy, reference, settings, step=number))
            processes.track({f"held_out/{k}": v for k, v in asdict(curve[-1]).items()}, number)
            best.note(_scores(curve))
            is_over = torch.tensor(float(best.is_over(_scores(curve))), device=processes.device)
            if processes.mean({"is_over": is_over})["is_over"] > 0:  # all stop together
                log.info("no gain since step %d; stopping", best_step(curve))
                break
        if is_asked and number < total:
            _stop(steps, curve, state, processes)
        if number % execution.save_every == 0 and number < total:
            _save(steps, curve, state, processes)
    processes.unwrap(policy)
    if execution.gradient_checkpointing:
        policy.network.disable_gradient_checkpointing()
    if average is not None:
        average.copy_to(parameters)
    best.put_back()
    policy.freeze()
    return steps, curve


def _save(
    steps: list[Step], curve: list[Progress], state: TrainingState, processes: Processes
) -> None:
    if processes.is_main:
        state.save([asdict(step) for step in steps], [asdict(point) for point in curve])
    processes.wait()


def _stop(
    steps: list[Step], curve: list[Progress], state: TrainingState, processes: Processes
) -> NoReturn:
    _save(steps, curve, state, processes)
    raise Stopped(f"the training's state of step {len(steps)} is saved in {state.folder}")


def _accumulate(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    pairs: EncodedPairs,
    rows: Int[Tensor, " batch"],
    settings: TrainingSettings,
    step_seed: int,
    processes: Processes,
    scaler: torch.amp.GradScaler,
    micro_batch_pairs: int | None,
) -> dict[str, Tensor] | None:
    """Gradients of the batch's mean loss, from this process's share of it; the share's measures.

    None if SIGTERM has come to a process that is alone: its grace may be shorter than a step. All
    processes draw for the whole batch and take their part: no two pairs share a noise, and one
    process alone would draw the same.
    """
    mine = processes.share(len(rows))
    draws = training_draws(
        step_seed,
        num_pairs=len(rows),
        num_timesteps=model.num_timesteps,
        latents_shape=tuple(pairs.winner.shape[1:]),
    )
    dropped = _dropped(len(rows), settings.caption_dropout, step_seed)[mine]
    rows, draws = rows[mine], Draws(draws.timesteps[mine], draws.noise[mine])
    size = micro_batch_pairs or len(rows)
    parts = [slice(start, start + size) for start in range(0, len(rows), size)]
    sums: dict[str, Tensor] = {}
    for part in parts:
        if STOP.is_asked and processes.count == 1:
            return None
        some = Draws(draws.timesteps[part], draws.noise[part])
        share = len(rows[part]) / len(rows)
        with nullcontext() if part is parts[-1] else processes.without_averaging(policy):
            with model.autocast():
                measures = batch_loss(
                    model, policy, reference, pairs, rows[part], some, settings, dropped[part]
                )
            scaler.scale(measures["loss"] * share).backward()  # type: ignore[no-untyped-call]
        for name, value in measures.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * share
    return sums


def batch_loss(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    pairs: EncodedPairs,
    rows: Int[Tensor, " chosen"],
    draws: Draws,
    settings: TrainingSettings,
    dropped: Bool[Tensor, " chosen"],
) -> dict[str, Tensor]:
    """The mean loss of some pairs and what is logged with it; winner and loser share their draw.

    Captions are left out where `dropped` is true. The reference predicts first: what is computed
    twice by gradient checkpointing must see the policy's adapter.
    """
    errors = pair_errors(model, policy, reference, pairs, rows, draws, dropped)
    logit = preference_logit(errors, settings.dpo_beta)
    loss = LOSSES[settings.loss](
        errors,
        LossSettings(
            dpo_beta=settings.dpo_beta,
            label_smoothing=settings.label_smoothing,
            num_timesteps=model.num_timesteps,
        ),
    )
    return {
        "loss": loss.mean(),
        "implicit_accuracy": (logit > 0).float().mean(),
        "logit": logit.mean(),
        "winner_error": (errors.policy_w - errors.reference_w).mean(),
        "loser_error": (errors.policy_l - errors.reference_l).mean(),
    }


def pair_errors(
    model: DiffusionModel,
    policy: Denoiser,
    reference: Denoiser | None,
    pairs: EncodedPairs,
    rows: Int[Tensor, " chosen"],
    draws: Draws,
    dropped: Bool[Tensor, " chosen"],
) -> PairErrors:
    """Errors of policy and reference on both images of some pairs; a missing reference's are 0."""
    device, dtype = model.device, pairs.winner.dtype
    captions = torch.where(dropped, len(pairs.text) - 1, pairs.caption[rows])
    geometry = torch.cat([pairs.winner_geometry[rows], pairs.loser_geometry[rows]])
    context = model.place(pairs.text.rows(captions).to(device).repeat(2), geometry.to(device))
    noise = draws.noise.to(device, dtype).repeat(2, 1, 1, 1)
    timesteps = draws.timesteps.to(device).repeat(2)
    latents = torch.cat([pairs.winner[rows], pairs.loser[rows]]).to(device, dtype)
    noised = model.add_noise(latents, noise, timesteps)
    target = model.target(latents, noise, timesteps)
    if reference is None:
        reference_error = torch.zeros(len(noised), device=device)
    else:
        with torch.no_grad():
            prediction = model.predict(reference, noised, timesteps, context)
            reference_error = denoising_error(prediction, target)
    policy_error = denoising_error(model.predict(policy, noised, timesteps, context), target)
    return PairErrors(*policy_error.chunk(2), *reference_error.chunk(2))


@dataclass(frozen=True)
class Progress:
    """The held-out pairs as the policy judges them at one step; see schemas.HELD_OUT_CURVE."""

    step: int
    accuracy: float
    logit: float
    winner_error: float
    loser_error: float


@dataclass(frozen=True)
class HeldOut:
    """Human pairs that are not trained on, with fixed draws: the same question at every step."""

    pairs: EncodedPairs
    num_draws: int
    every_steps: int
    seed: int
    rows_per_batch: int = 32
    """Pairs at once; fewer if the training's micro-batches are smaller."""

    @torch.no_grad()
    def score(
        self,
        model: DiffusionModel,
        policy: Denoiser,
        reference: Denoiser | None,
        settings: TrainingSettings,
        *,
        step: int,
    ) -> Progress:
        """Accuracy, mean logit, and how far winner and loser errors have moved from the reference.

        The logit of a pair is its mean over the draws; an undecided pair counts half.
        """
        count = len(self.pairs)
        rows = torch.arange(count).repeat(self.num_draws)
        draws = training_draws(
            self.seed,
            num_pairs=len(rows),
            num_timesteps=model.num_timesteps,
            latents_shape=tuple(self.pairs.winner.shape[1:]),
        )
        found: list[PairErrors] = []
        for start in range(0, len(rows), self.rows_per_batch):
            part = slice(start, start + self.rows_per_batch)
            some = Draws(draws.timesteps[part], draws.noise[part])
            with model.autocast():
                found.append(
                    pair_errors(
                        model, policy, reference, self.pairs, rows[part], some,
                        torch.zeros(len(rows[part]), dtype=torch.bool),
                    )
                )  # fmt: skip
        logit = torch.cat([preference_logit(e, settings.dpo_beta) for e in found])
        logit = logit.reshape(self.num_draws, count).mean(dim=0)
        decided = (logit > 0).float() + 0.5 * (logit == 0).float()
        return Progress(
            step=step,
            accuracy=float(decided.mean()),
            logit=float(logit.mean()),
            winner_error=float(torch.cat([e.policy_w - e.reference_w for e in found]).mean()),
            loser_error=float(torch.cat([e.policy_l - e.reference_l for e in found]).mean()),
        )


def best_step(curve: list[Progress]) -> int:
    """The step with the best held-out score, whose weights early stopping keeps."""
    return curve[best_score(_scores(curve))].step


def _scores(curve: list[Progress]) -> list[Score]:
    return [(point.accuracy, point.logit) for point in curve]


def _refuse_unscored_stop(settings: TrainingSettings, held_out: HeldOut | None) -> None:
    """UserError for early stopping without held-out scores, or of an average that nobody scores."""
    if settings.stop_after_no_gain and held_out is None:
        raise UserError(
            f"stop_after_no_gain is {settings.stop_after_no_gain}, but no held-out pairs are scored; "
            "set held_out_curve.num_pairs"
        )
    if settings.stop_after_no_gain and settings.ema_decay:
        raise UserError(
            "stop_after_no_gain keeps weights that were scored, ema_decay an average that was not; "
            "set one of them to 0"
        )


def needs_reference(settings: TrainingSettings) -> bool:
    """Whether the loss looks at the reference at all."""
    return settings.loss not in WITHOUT_REFERENCE


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


def _dropped(count: int, share: float, step_seed: int) -> Bool[Tensor, " batch"]:
    """Which pairs of a batch lose their caption, both images alike."""
    if share == 0:
        return torch.zeros(count, dtype=torch.bool)
    rng = torch.Generator().manual_seed(seed_of(step_seed, "dropout"))
    return torch.rand(count, generator=rng) < share


def _refuse_not_finite(
    step: int,
    loss: float,
    norm: float,
    scaler: torch.amp.GradScaler,
    state: TrainingState,
) -> None:
    """TrainingError unless loss and gradient are finite.

    With float16 a gradient may overflow now and then: the scaler leaves that step out and scales
    less; only when it cannot scale any less is it an error.
    """
    can_scale_less = scaler.is_enabled() and scaler.get_scale() > 1
    if math.isfinite(loss) and (math.isfinite(norm) or can_scale_less):
        return
    kept = f"the state of step {state.saved_step} is kept in {state.folder}"
    if state.saved_step == 0:
        kept = "no state had been saved yet"
    raise TrainingError(
        f"training stopped at step {step}: loss {loss}, gradient norm {norm}. "
        f"No policy was written; {kept}. Lower learning_rate or dpo_beta, or use dtype float32, "
        "then run again."
    )
