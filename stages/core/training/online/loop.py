"""Rounds of sampling and training in one group of processes."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from stages.core.execution.runtime import progress
from stages.core.execution.stopping import STOP, Stopped
from stages.core.method.seeding import seed_of
from stages.core.method.trajectories import Chains, chain_schedule
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.training.early_stopping import KeptWeights
from stages.core.training.held_out import HeldOut, Progress, within
from stages.core.training.loop import FIRST_SCALE, TrainingError
from stages.core.training.online.batches import batches
from stages.core.training.online.judges import StepJudge
from stages.core.training.online.losses import Learner
from stages.core.training.online.rounds import Asked, Rounds, Shown
from stages.core.training.online.settings import OnlineSettings
from stages.core.training.online.transitions import Transitions
from stages.core.training.optimizers import make_optimizer
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings
from stages.core.training.state import TrainingState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What one optimizer step saw; see online_tables.ONLINE_TRAINING."""

    step: int
    round: int
    num_transitions: int
    mean_score: float
    valid_share: float
    loss: float
    log_ratio: float
    clipped_share: float
    implicit_accuracy: float | None
    gradient_norm: float
    learning_rate: float
    transitions_per_second: float
    sampling_seconds: float


class OnlineTraining:
    """One online training of a policy: sampling, judging and updates, round after round.

    What a round samples follows from its number and the policy alone, so that the state on disk is that of an
    ordinary training: weights, optimizer and records, saved between rounds. An interrupted training repeats the
    rounds since, and ends with the same weights and tables. Several processes share the prompts of a round
    and each batch; all hold the whole round's transitions.
    """

    def __init__(
        self,
        model: DiffusionModel,
        policy: Denoiser,
        reference: Denoiser,
        judge: StepJudge,
        asked: Asked,
        settings: OnlineSettings,
        *,
        seed: int,
        work: Path,
        identity: str,
        processes: Processes,
        execution: Execution,
        prompts_per_batch: int,
        held_out: HeldOut | None = None,
    ) -> None:
        """Where a saved state of the same identity stands, else before the first round."""
        self.model, self.policy, self.reference = model, policy, reference
        self.asked, self.settings, self.seed = asked, settings, seed
        self.processes, self.execution = processes, execution
        self.held_out = within(held_out, execution.micro_batch_pairs)
        self.sampled = Rounds(
            judge, asked, settings,
            seed=seed, folder=work / "rounds", processes=processes,
            prompts_per_batch=prompts_per_batch,
        )  # fmt: skip
        self.parameters = policy.trainable()
        self.optimizer = make_optimizer(
            settings.optimizer,
            self.parameters,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(
            model.device.type, init_scale=FIRST_SCALE, enabled=model.dtype == torch.float16
        )
        kept = KeptWeights(self.parameters, 0)
        self.state = TrainingState(work, identity, policy, self.optimizer, self.scaler, None, kept)
        records = self.state.restore()
        self.steps = [Step(**step) for step in records["steps"]]
        self.curve = [Progress(**point) for point in records["curve"]]
        self.done = self.steps[-1].round if self.steps else 0
        self.sampled.remember(self.done)
        self.saved_at = time.monotonic()

    @property
    def rounds(self) -> list[Path]:
        """The tables of the rounds so far, in their order."""
        return [self.sampled.table(number) for number in range(1, self.done + 1)]

    def run(self) -> tuple[list[Step], list[Progress]]:
        """Train the policy in place; one record per step, and the held-out curve.

        TrainingError if loss or gradient stop being finite, and where no comparison of any round was clear.
        """
        is_checkpointed = self.execution.gradient_checkpointing
        if is_checkpointed:
            self.policy.network.enable_gradient_checkpointing()
        self.processes.wrap(self.policy)
        self._go_on()
        self.processes.unwrap(self.policy)
        if is_checkpointed:
            self.policy.network.disable_gradient_checkpointing()
        self.policy.freeze()
        if not self.steps:
            raise TrainingError(
                f"nothing was trained: in none of {self.settings.rounds} rounds did the judge prefer one candidate "
                f"by more than min_preference_gap = {self.settings.min_preference_gap}. Lower it, or raise the "
                "judge's scale"
            )
        return self.steps, self.curve

    def _go_on(self) -> None:
        if self.held_out is not None and not self.curve:
            self._score(self.held_out)
        left = range(self.done + 1, self.settings.rounds + 1)
        size = self.settings.prompts_per_update
        for number in progress(left, "training online", "prompts", size):
            shown = self.sampled.sample(number, self._chains(self._without_averaging()))
            if shown is None:
                self._stop()
            before = len(self.steps)
            for batch in batches(
                shown.transitions, self.settings, seed_of(self.seed, "batches", number)
            ):
                self._take_step(number, shown, shown.transitions.rows(batch))
            self.done = number
            if not len(shown.transitions):
                log.warning("round %d: no comparison was clear, nothing was trained", number)
            if self.held_out is not None:
                self._score_if_due(self.held_out, before, is_last=number == self.settings.rounds)
            if number == self.settings.rounds:
                return
            if self._is_somewhere(STOP.is_asked):
                self._stop()
            if self._is_somewhere(self._is_due()):
                self._save()

    # One round

    def _without_averaging(self) -> Denoiser:
        """The policy for sampling: its own network, not what averages gradients over the processes."""
        denoiser = Denoiser(self.policy.network, self.policy.adapter)
        denoiser.is_trainable = True
        return denoiser

    def _chains(self, denoiser: Denoiser) -> Chains:
        return Chains(
            model=self.model, denoiser=denoiser,
            schedule=chain_schedule(
                self.model, self.settings.num_inference_steps, self.settings.noise_level
            ),
            unconditional=self.asked.unconditional,
            guidance_scale=self.settings.guidance_scale,
        )  # fmt: skip

    # One optimizer step

    def _take_step(self, number: int, shown: Shown, batch: Transitions) -> None:
        started = time.monotonic()
        self.optimizer.zero_grad(set_to_none=True)
        values = self._accumulate(batch)
        self.scaler.unscale_(self.optimizer)
        clip = self.settings.gradient_clip
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
        self._refuse_not_finite(values["loss"], norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        step = Step(
            step=len(self.steps) + 1,
            round=number,
            num_transitions=len(batch),
            mean_score=shown.mean_score,
            valid_share=shown.valid_share,
            loss=values["loss"],
            log_ratio=values["log_ratio"],
            clipped_share=values["clipped_share"],
            implicit_accuracy=values.get("implicit_accuracy"),
            gradient_norm=norm,
            learning_rate=self.settings.learning_rate,
            transitions_per_second=len(batch) / (time.monotonic() - started),
            sampling_seconds=shown.seconds,
        )
        self.steps.append(step)
        tracked = {name: value for name, value in asdict(step).items() if value is not None}
        self.processes.track(tracked, step.step)

    def _accumulate(self, batch: Transitions) -> dict[str, float]:
        """Gradients of the batch's mean loss, of which this process takes every so-manieth item; its measures.

        A process for which none is left takes the first with weight 0, for all must average together.
        """
        count, rank = self.processes.count, self.processes.rank
        mine = torch.arange(rank, len(batch), count)
        weight = count / len(batch) if len(mine) else 0.0
        mine = mine if len(mine) else torch.zeros(1, dtype=torch.int64)
        size = self.execution.micro_batch_pairs or len(mine)
        learner = Learner(
            policy=self._chains(self.policy), reference=self._chains(self.reference),
            settings=self.settings, text=self.asked.text,
        )  # fmt: skip
        sums: dict[str, Tensor] = {}
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        for part in parts:
            is_last = part is parts[-1]
            with nullcontext() if is_last else self.processes.without_averaging(self.policy):
                measures = learner.losses(batch.rows(part))
                loss = measures.pop("loss").sum() * weight
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            sums["loss"] = sums.get("loss", torch.zeros(())) + loss.detach().cpu()
            for name, value in measures.items():
                share = value.detach().cpu() * (len(part) * weight)
                sums[name] = sums.get(name, torch.zeros(())) + share
        device = self.processes.device
        return self.processes.mean({name: value.to(device) for name, value in sums.items()})

    def _refuse_not_finite(self, loss: float, norm: float) -> None:
        """TrainingError unless loss and gradient are finite; float16's scaler may still scale less."""
        can_scale_less = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if math.isfinite(loss) and (math.isfinite(norm) or can_scale_less):
            return
        kept = f"the state of step {self.state.saved_step} is kept in {self.state.folder}"
        raise TrainingError(
            f"training stopped at step {len(self.steps) + 1}: loss {loss}, gradient norm {norm}. No policy was "
            f"written; {kept if self.state.saved_step else 'no state had been saved yet'}. Lower learning_rate, "
            "or use dtype float32, then run again."
        )

    # Held-out pairs

    def _score_if_due(self, held_out: HeldOut, before: int, *, is_last: bool) -> None:
        every = held_out.every_steps
        is_scored = self.curve[-1].step == len(self.steps)
        if not is_scored and (is_last or len(self.steps) // every > before // every):
            self._score(held_out)

    def _score(self, held_out: HeldOut) -> None:
        """Add a point to the held-out curve."""
        number = len(self.steps)
        point = held_out.score(
            self.model, self.policy, self.reference, _as_pairs(self.settings), step=number
        )
        self.curve.append(point)
        if number:
            measures = {f"held_out/{name}": value for name, value in point.measures.items()}
            self.processes.track(measures, number)

    # What is kept on disk

    def _save(self) -> None:
        if self.processes.is_main:
            self.state.save(
                [asdict(step) for step in self.steps], [asdict(point) for point in self.curve]
            )
        self.processes.wait()
        self.state.saved_step = len(self.steps)  # in all: each asks when the next state is due
        self.saved_at = time.monotonic()

    def _is_due(self) -> bool:
        """Whether the state is to be saved after a round."""
        every = self.execution.save_every
        minutes = (time.monotonic() - self.saved_at) / 60
        num_new = len(self.steps) - self.state.saved_step
        return minutes >= self.execution.save_minutes or bool(every and num_new >= every)

    def _is_somewhere(self, is_so: bool) -> bool:
        """Whether it is so in one of the processes: all stop together, and save together."""
        found = torch.tensor(float(is_so), device=self.processes.device)
        return self.processes.mean({"found": found})["found"] > 0

    def _stop(self) -> NoReturn:
        """Between rounds, or while one is sampled: the weights are those of the last whole round."""
        if not self.steps:
            raise Stopped(
                "nothing had been trained, so nothing is saved: started again, it begins anew"
            )
        self._save()
        raise Stopped(
            f"the training's state of step {len(self.steps)} is saved in {self.state.folder}"
        )


def _as_pairs(settings: OnlineSettings) -> TrainingSettings:
    """What scores held-out pairs: of all of it, only dpo_beta counts."""
    return TrainingSettings(
        dpo_beta=settings.dpo_beta, learning_rate=settings.learning_rate, batch_pairs=1, passes=1.0,
        warmup_share=0.0, gradient_clip=settings.gradient_clip,
        weight_decay=settings.weight_decay, caption_dropout=0.0,
    )  # fmt: skip
