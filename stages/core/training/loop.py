"""One Diffusion-DPO training loop, for the seed training and for every update."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from jaxtyping import Bool, Int
from torch import Tensor

from stages.core.errors import UserError
from stages.core.execution.runtime import progress
from stages.core.execution.stopping import STOP, Stopped
from stages.core.method.noising import Draws, training_draws
from stages.core.method.objective import OF_A_WHOLE_BATCH
from stages.core.method.seeding import seed_of
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.policies.encoding import EncodedLikes, EncodedPairs
from stages.core.training.early_stopping import KeptWeights
from stages.core.training.held_out import HeldOut, Progress, kept_step, scores_of, within
from stages.core.training.optimizers import make_optimizer
from stages.core.training.pair_losses import batch_loss, gain_of
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings, num_steps
from stages.core.training.state import TrainingState

log = logging.getLogger(__name__)

FIRST_SCALE = 1024.0
"""Of float16's loss: dpo_beta makes gradients large already, so less than torch's 65536."""


class TrainingError(UserError):
    """A training that cannot go on; the message names the step, the loss and the last good state."""


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


class Training:
    """One training of a policy on pairs, or on single likes: what it works on, and what it has shown so far.

    The state is saved in `work` by minutes or steps under `identity`: the same training, started
    again after an interruption, continues from there and ends with the same weights.
    Several processes share each batch; what a pair draws does not depend on how many there are.
    Paper: SAIL Alg. 1; Diffusion-DPO's loss on mean errors.
    """

    def __init__(
        self,
        model: DiffusionModel,
        policy: Denoiser,
        reference: Denoiser | None,
        pairs: EncodedPairs | EncodedLikes,
        settings: TrainingSettings,
        *,
        seed: int,
        work: Path,
        identity: str,
        processes: Processes,
        execution: Execution,
        held_out: HeldOut | None = None,
    ) -> None:
        """Where a saved state of the same identity stands, else before the first step."""
        _refuse_unscored_stop(settings, held_out)
        self.model, self.policy, self.reference = model, policy, reference
        self.pairs, self.settings, self.seed = pairs, settings, seed
        self.processes, self.execution = processes, execution
        self.held_out = within(held_out, execution.micro_batch_pairs)
        self.parameters = policy.trainable()
        self.optimizer = make_optimizer(
            settings.optimizer,
            self.parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.average = (
            EMAModel(self.parameters, decay=settings.ema_decay) if settings.ema_decay > 0 else None
        )
        self.scaler = torch.amp.GradScaler(
            model.device.type, init_scale=FIRST_SCALE, enabled=model.dtype == torch.float16
        )
        self.kept = KeptWeights(self.parameters, settings.stop_after_no_gain)
        self.state = TrainingState(
            work, identity, policy, self.optimizer, self.scaler, self.average, self.kept
        )
        records = self.state.restore()
        self.steps = [Step(**step) for step in records["steps"]]
        self.curve = [Progress(**point) for point in records["curve"]]
        self.total = num_steps(pairs.num_items, settings)
        self.saved_at = time.monotonic()
        self.order = order_of(pairs.num_items, self.total * settings.batch_pairs, seed)

    def run(self) -> tuple[list[Step], list[Progress]]:
        """Train the policy in place; one record per step, and the held-out curve.

        TrainingError if the loss or the gradient stops being finite; the state then stays where it
        was.
        """
        is_checkpointed = self.execution.gradient_checkpointing
        if is_checkpointed:
            self.policy.network.enable_gradient_checkpointing()
        self.processes.wrap(self.policy)
        self._go_on()
        self.processes.unwrap(self.policy)
        if is_checkpointed:
            self.policy.network.disable_gradient_checkpointing()
        self._put_final_weights()
        self.policy.freeze()
        return self.steps, self.curve

    def _go_on(self) -> None:
        """Take the steps that are left; score and save on the way."""
        if self.held_out is not None and not self.curve:
            self._score(self.held_out, 0)
        left = range(len(self.steps) + 1, self.total + 1)
        for number in progress(left, "training", "pairs", self.settings.batch_pairs):
            is_asked_to_stop, is_due = self._take_step(number)
            if self.held_out is not None and self._is_scored_at(self.held_out, number):
                self._score(self.held_out, number)
                if self._has_stopped_gaining():
                    log.info("judged worse since step %d; stopping", kept_step(self.curve))
                    return
            if number == self.total:
                return
            if is_asked_to_stop:
                self._stop()
            if is_due:
                self._save()

    def _put_final_weights(self) -> None:
        """Give the policy the average of its weights, or the kept ones, where asked for."""
        if self.average is not None:
            self.average.copy_to(self.parameters)
        self.kept.put_back()

    def _take_step(self, number: int) -> tuple[bool, bool]:
        """One optimizer step; whether SIGTERM has come to any of the processes, and whether to save the state."""
        started = time.monotonic()
        settings, processes = self.settings, self.processes
        rate = _learning_rate(number, self.total, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = self.order[(number - 1) * settings.batch_pairs : number * settings.batch_pairs]
        self.optimizer.zero_grad(set_to_none=True)
        measures = self._accumulate(rows, seed_of(self.seed, "draws", number))
        if measures is None:
            self._stop()
        asked, due = (
            torch.tensor(float(each), device=processes.device)
            for each in (STOP.is_asked, self._is_due(number))
        )
        values = processes.mean({**measures, "asked": asked, "due": due})
        # By one of the processes, whose clocks differ: all stop together, and save together.
        is_asked, is_due = (values.pop(name) > 0 for name in ("asked", "due"))
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, settings.gradient_clip))
        refuse_not_finite(number, values["loss"], norm, self.scaler, self.state)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.step(self.parameters)
        step = Step(
            step=number,
            gradient_norm=norm,
            learning_rate=rate,
            pairs_per_second=len(rows) / (time.monotonic() - started),
            **values,
        )
        self.steps.append(step)
        self.pairs.let_go()
        processes.track(asdict(step), number)
        return is_asked, is_due

    def _accumulate(self, rows: Int[Tensor, " batch"], step_seed: int) -> dict[str, Tensor] | None:
        """Gradients of the batch's mean loss, from this process's share of it; the share's measures.

        None if SIGTERM has come to a process that is alone: its grace may be shorter than a step.
        """
        rows, draws, dropped = self._share(rows, step_seed)
        size = self.execution.micro_batch_pairs or len(rows)
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        gain = 0.0
        if self.settings.loss in OF_A_WHOLE_BATCH:
            gain = self._mean_gain(rows, draws, dropped, parts)
        sums: dict[str, Tensor] = {}
        for part in parts:
            if STOP.is_asked and self.processes.count == 1:
                return None
            weight = len(rows[part]) / len(rows)
            is_last = part is parts[-1]
            with nullcontext() if is_last else self.processes.without_averaging(self.policy):
                with self.model.autocast():
                    measures = batch_loss(
                        self.model, self.policy, self.reference, self.pairs, rows[part],
                        Draws(draws.timesteps[part], draws.noise[part]),
                        self.settings, dropped[part], gain,
                    )  # fmt: skip
                loss = measures["loss"] * weight
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            for name, value in measures.items():
                sums[name] = sums.get(name, 0.0) + value.detach() * weight
        return sums

    @torch.no_grad()
    def _mean_gain(
        self,
        rows: Int[Tensor, " share"],
        draws: Draws,
        dropped: Bool[Tensor, " share"],
        parts: list[slice],
    ) -> float:
        """The whole batch's mean gain, by a pass of its own: no micro-batch knows it, nor does a process."""
        found = torch.zeros((), device=self.processes.device)
        for part in parts:
            with self.model.autocast():
                gain = gain_of(
                    self.model, self.policy, self.reference, self.pairs, rows[part],
                    Draws(draws.timesteps[part], draws.noise[part]), dropped[part], self.settings,
                )  # fmt: skip
            found += gain.to(found) * (len(rows[part]) / len(rows))
        return self.processes.mean({"gain": found})["gain"]

    def _share(
        self, rows: Int[Tensor, " batch"], step_seed: int
    ) -> tuple[Int[Tensor, " share"], Draws, Bool[Tensor, " share"]]:
        """Rows of the batch that this process takes, their draws, and which lose their caption.

        All processes draw for the whole batch and take their part: no two pairs share a noise, and
        one process alone would draw the same.
        """
        mine = self.processes.share(len(rows))
        draws = training_draws(
            step_seed,
            num_pairs=len(rows),
            num_timesteps=self.model.num_timesteps,
            latents_shape=self.pairs.latents_shape,
            law=self.settings.draw_law,
        )
        dropped = _dropped(len(rows), self.settings.caption_dropout, step_seed)
        return rows[mine], Draws(draws.timesteps[mine], draws.noise[mine]), dropped[mine]

    def _is_scored_at(self, held_out: HeldOut, number: int) -> bool:
        return number % held_out.every_steps == 0 or number == self.total

    def _score(self, held_out: HeldOut, number: int) -> None:
        """Add a point to the held-out curve, and keep the weights if they judge no worse."""
        point = held_out.score(self.model, self.policy, self.reference, self.settings, step=number)
        self.curve.append(point)
        if number:
            measures = {f"held_out/{name}": value for name, value in point.measures.items()}
            self.processes.track(measures, number)
        self.kept.note(scores_of(self.curve))

    def _has_stopped_gaining(self) -> bool:
        warmup = _warmup_steps(self.total, self.settings)  # a rate that still rises shows no end
        num_early = sum(point.step <= warmup for point in self.curve)
        is_over = float(self.kept.is_over(scores_of(self.curve), num_early))
        found = self.processes.mean(
            {"is_over": torch.tensor(is_over, device=self.processes.device)}
        )
        return found["is_over"] > 0  # all stop together

    def _is_due(self, number: int) -> bool:
        """Whether the state is to be saved after a step."""
        every = self.execution.save_every
        minutes = (time.monotonic() - self.saved_at) / 60
        return minutes >= self.execution.save_minutes or bool(every and number % every == 0)

    def _save(self) -> None:
        if self.processes.is_main:
            self.state.save(
                [asdict(step) for step in self.steps], [asdict(point) for point in self.curve]
            )
        self.processes.wait()
        self.saved_at = time.monotonic()

    def _stop(self) -> NoReturn:
        self._save()
        raise Stopped(
            f"the training's state of step {len(self.steps)} is saved in {self.state.folder}"
        )


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


def _learning_rate(step: int, total: int, settings: TrainingSettings) -> float:
    """Linear warmup over the first share of the steps, then constant. Paper: as Diffusion-DPO."""
    warmup = _warmup_steps(total, settings)
    return settings.learning_rate * min(1.0, step / warmup if warmup else 1.0)


def _warmup_steps(total: int, settings: TrainingSettings) -> int:
    return math.ceil(settings.warmup_share * total)


def order_of(num_pairs: int, num_wanted: int, seed: int) -> Int[Tensor, " row"]:
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


def refuse_not_finite(
    step: int, loss: float, norm: float, scaler: torch.amp.GradScaler, state: TrainingState
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
