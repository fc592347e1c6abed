"""The training of a step-aware preference model, step by step."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.execution.runtime import progress
from stages.core.execution.stopping import STOP, Stopped
from stages.core.method.noising import Draws, training_draws
from stages.core.method.seeding import seed_of
from stages.core.method.step_preference import (
    labels_by_score,
    pair_weights,
    shares_right,
    step_preference_loss,
)
from stages.core.policies.encoding import EncodedPairs
from stages.core.training.early_stopping import KeptWeights
from stages.core.training.loop import FIRST_SCALE, order_of, refuse_not_finite
from stages.core.training.optimizers import make_optimizer
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution
from stages.core.training.state import TrainingState
from stages.core.training.step_judge.estimates import Estimates
from stages.core.training.step_judge.held_out import HeldOutJudgement, Point
from stages.core.training.step_judge.scores import scores_of_pairs
from stages.core.training.step_judge.settings import (
    StepJudgeSettings,
    TrainableJudge,
    learning_rate,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What one optimizer step saw; see online_tables.STEP_JUDGE_TRAINING."""

    step: int
    loss: float
    accuracy: float
    tie_share: float
    gradient_norm: float
    learning_rate: float
    pairs_per_second: float


class StepJudgeTraining:
    """One training of a judge on pairs that a model sees at random timesteps.

    The state is saved in `work` under `identity`, as that of a policy's training: a training that was killed
    ends with the same weights and tables. Order, timesteps and noise follow from a step's number. Several
    processes share each batch.
    """

    def __init__(
        self,
        judge: TrainableJudge,
        teacher: TrainableJudge | None,
        estimates: Estimates,
        pairs: EncodedPairs,
        prompts: Sequence[str],
        settings: StepJudgeSettings,
        *,
        seed: int,
        work: Path,
        identity: str,
        processes: Processes,
        execution: Execution,
        held_out: HeldOutJudgement | None,
    ) -> None:
        """Where a saved state of the same identity stands, else before the first step.

        `teacher` labels the pairs where people do not; it is never trained.
        """
        self.judge, self.teacher, self.estimates = judge, teacher, estimates
        self.model = estimates.model
        self.pairs, self.prompts, self.settings, self.seed = pairs, prompts, settings, seed
        self.processes, self.execution, self.held_out = processes, execution, held_out
        self.parameters = judge.network.trainable()
        self.optimizer = make_optimizer(
            settings.optimizer,
            self.parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(
            self.model.device.type,
            init_scale=FIRST_SCALE,
            enabled=self.model.dtype == torch.float16,
        )
        self.state = TrainingState(
            work, identity, judge.network, self.optimizer, self.scaler, None,
            KeptWeights(self.parameters, 0),
        )  # fmt: skip
        records = self.state.restore()
        self.steps = [Step(**step) for step in records["steps"]]
        self.curve = [Point(**point) for point in records["curve"]]
        self.saved_at = time.monotonic()
        self.order = order_of(len(pairs), settings.num_steps * settings.batch_pairs, seed)

    def run(self) -> None:
        """Train the judge in place; `steps` and `curve` tell of it.

        TrainingError if the loss or the gradient stops being finite; the state then stays where it was.
        """
        if self.execution.gradient_checkpointing:
            self.judge.network.network.enable_gradient_checkpointing()
        self.processes.wrap(self.judge.network)
        self._go_on()
        self.processes.unwrap(self.judge.network)
        self.judge.network.freeze()

    def _go_on(self) -> None:
        if not self.curve:
            self._score(0)
        total = self.settings.num_steps
        left = range(len(self.steps) + 1, total + 1)
        for number in progress(left, "training the judge", "pairs", self.settings.batch_pairs):
            is_asked, is_due = self._take_step(number)
            if self.held_out and (number % self.held_out.every_steps == 0 or number == total):
                self._score(number)
            if number == total:
                return
            if is_asked:
                self._stop()
            if is_due:
                self._save()

    def _take_step(self, number: int) -> tuple[bool, bool]:
        """One optimizer step; whether SIGTERM has come to any of the processes, and whether to save the state."""
        started = time.monotonic()
        settings, processes = self.settings, self.processes
        rate = learning_rate(number, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        size = settings.batch_pairs
        rows = self.order[(number - 1) * size : number * size]
        self.optimizer.zero_grad(set_to_none=True)
        measures = self._accumulate(rows, seed_of(self.seed, "draws", number))
        for name, is_so in (("asked", STOP.is_asked), ("due", self._is_due(number))):
            measures[name] = torch.tensor(float(is_so), device=processes.device)
        values = processes.mean(measures)
        # By one of the processes, whose clocks differ: all stop together, and save together.
        is_asked, is_due = (values.pop(name) > 0 for name in ("asked", "due"))
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, settings.gradient_clip))
        refuse_not_finite(number, values["loss"], norm, self.scaler, self.state)
        self.scaler.step(self.optimizer)
        self.scaler.update()
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

    def _accumulate(self, rows: Int[Tensor, " batch"], step_seed: int) -> dict[str, Tensor]:
        """Gradients of the batch's loss, from this process's share of it; the share's measures.

        All processes draw for the whole batch and take their part, as a policy's training does.
        """
        processes, model = self.processes, self.model
        mine = processes.share(len(rows))
        draws = training_draws(
            step_seed,
            num_pairs=len(rows),
            num_timesteps=model.num_timesteps,
            latents_shape=model.latents_shape,
        )
        weights = pair_weights(self.prompts, rows.tolist())[mine] * processes.count
        rows, draws = rows[mine], Draws(draws.timesteps[mine], draws.noise[mine])
        size = self.execution.micro_batch_pairs or len(rows)
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        device = processes.device
        sums = {name: torch.zeros((), device=device) for name in ("loss", "accuracy", "tie_share")}
        for part in parts:
            if STOP.is_asked and processes.count == 1:
                self._stop()  # its grace may be shorter than a step
            some = Draws(draws.timesteps[part], draws.noise[part])
            label = self._labels(rows[part])
            is_last = part is parts[-1]
            with nullcontext() if is_last else processes.without_averaging(self.judge.network):
                first, second = scores_of_pairs(
                    self.judge, self.estimates, self.pairs, self.prompts, rows[part], some
                )
                losses = step_preference_loss(first, second, label)
                loss = (losses * weights[part].to(losses)).sum()
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            sums["loss"] += loss.detach()
            right = shares_right(first.detach(), second.detach(), label)
            sums["accuracy"] += right.sum() / len(rows)
            sums["tie_share"] += (label == 0.5).sum() / len(rows)
        return sums

    @torch.no_grad()
    def _labels(self, rows: Int[Tensor, " part"]) -> Float[Tensor, " part"]:
        """1 where the winner is preferred; by the teacher, if there is one, from the finished images."""
        if self.teacher is None:
            return torch.ones(len(rows), device=self.model.device)
        first, second = scores_of_pairs(
            self.teacher, self.estimates, self.pairs, self.prompts, rows, None
        )
        return labels_by_score(first, second, self.settings.min_label_gap)

    def _score(self, number: int) -> None:
        if self.held_out is None:
            return
        found = self.held_out.score(self.judge, self.estimates, step=number)
        self.curve += found
        if number:
            for point in found:
                measures = {"accuracy": point.accuracy, "log_loss": point.log_loss}
                named = {f"held_out/{k}_at_{point.timestep}": v for k, v in measures.items()}
                self.processes.track(named, number)

    # What is kept on disk

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
