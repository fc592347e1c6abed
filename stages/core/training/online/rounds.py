"""One round after the other: prompts, sampling, judging, and the table of each on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stages.core.artifacts.online_tables import TRANSITIONS
from stages.core.artifacts.tables import read_table, write_table
from stages.core.errors import UserError
from stages.core.execution.stopping import STOP
from stages.core.method.online_objective import PromptStatistics
from stages.core.method.seeding import seed_of
from stages.core.method.trajectories import Chains
from stages.core.models.conditioning import Conditioning
from stages.core.training.online.judges import StepJudge
from stages.core.training.online.rollouts import Prompt, Sampler, shares
from stages.core.training.online.settings import OnlineSettings
from stages.core.training.online.transitions import Rollout, Transitions, joined
from stages.core.training.processes import Processes


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The prompts that are trained on."""

    prompts: Sequence[tuple[str, str]]
    """(prompt_id, prompt)."""
    text: Conditioning
    """A row for each of them, on the CPU."""
    unconditional: Conditioning
    """One row."""

    def of_round(self, number: int, count: int, seed: int) -> list[Prompt]:
        """The prompts of a round: the next ones of shuffled passes over all."""
        found = []
        for place in range(count):
            each = (number - 1) * count + place
            passed, position = divmod(each, len(self.prompts))
            order = np.random.default_rng(seed_of(seed, "order", passed))
            caption = int(order.permutation(len(self.prompts))[position])
            name, prompt = self.prompts[caption]
            found.append(
                Prompt(
                    place=place, prompt_id=name, prompt=prompt, caption=caption,
                    seed=seed_of(seed, "chain", number, place),
                )
            )  # fmt: skip
        return found


@dataclass(frozen=True)
class Shown:
    """What a round's sampling showed."""

    transitions: Transitions
    mean_score: float
    valid_share: float
    seconds: float


class Rounds:
    """What is sampled in each round, by whichever policy samples it; several processes share its prompts."""

    def __init__(
        self,
        judge: StepJudge,
        asked: Asked,
        settings: OnlineSettings,
        *,
        seed: int,
        folder: Path,
        processes: Processes,
        prompts_per_batch: int,
    ) -> None:
        """UserError unless the processes can share a round's prompts equally."""
        if settings.prompts_per_update % processes.count:
            raise UserError(
                f"prompts_per_update is {settings.prompts_per_update}, which {processes.count} processes cannot "
                f"share equally; make it a multiple of {processes.count}"
            )
        self.judge, self.asked, self.settings, self.seed = judge, asked, settings, seed
        self.folder, self.processes, self.prompts_per_batch = folder, processes, prompts_per_batch
        self.statistics = PromptStatistics(settings.prompt_buffer, settings.prompt_min_count)

    def sample(self, number: int, chains: Chains) -> Shown | None:
        """Sample and judge a round's prompts, and write its table: what all processes found, the same in each.

        None if SIGTERM has come to a process that is alone: its grace may be shorter than a round.
        """
        started = time.monotonic()
        prompts = self.asked.of_round(number, self.settings.prompts_per_update, self.seed)
        sampler = Sampler(
            chains=chains, judge=self.judge, settings=self.settings,
            text=self.asked.text, round=number,
        )  # fmt: skip
        mine = prompts[self.processes.share(len(prompts))]
        parts = []
        for some in shares(mine, self.prompts_per_batch):
            if STOP.is_asked and self.processes.count == 1:
                return None
            parts.append(sampler.rollout(some))
        whole = joined(self._gathered(joined(parts)))
        if self.settings.method == "ddpo":
            whole = self._with_advantages(whole)
        if self.processes.is_main:
            write_table(
                self.table(number), whole.rows, TRANSITIONS, stage="train_online", arguments={}
            )
        scores = np.concatenate([row["scores"] for row in whole.rows])
        return Shown(
            whole.transitions,
            mean_score=float(scores.mean()),
            valid_share=float(np.mean([row["is_valid"] for row in whole.rows])),
            seconds=time.monotonic() - started,
        )

    def table(self, number: int) -> Path:
        """Where the table of a round lies until the training ends."""
        return self.folder / f"round-{number:06d}.parquet"

    def remember(self, num_done: int) -> None:
        """Know what the first rounds showed, from their tables; forget all others.

        ArtifactError if a table is missing or damaged.
        """
        known = [self.table(number) for number in range(1, num_done + 1)]
        if self.processes.is_main:
            if not known:
                shutil.rmtree(self.folder, ignore_errors=True)
            for path in set(self.folder.glob("*")) - set(known):
                path.unlink()
        if self.settings.method == "ddpo":
            for path in known:
                table = read_table(path, TRANSITIONS, ["prompt_id", "inference_step", "scores"])
                rows = [row for row in table.to_pylist() if row["inference_step"] == 0]
                self.statistics.keep(
                    [row["prompt_id"] for row in rows],
                    np.concatenate([row["scores"] for row in rows]).astype(np.float64),
                )
        self.processes.wait()

    def _gathered(self, own: Rollout) -> list[Rollout]:
        if self.processes.count == 1:
            return [own]
        from accelerate.utils import gather_object

        found: list[Rollout] = gather_object([own])
        return found

    def _with_advantages(self, whole: Rollout) -> Rollout:
        """The same, each transition with what its image's score is worth."""
        firsts = [row for row in whole.rows if row["inference_step"] == 0]
        found = self.statistics.advantages(
            [row["prompt_id"] for row in firsts],
            np.concatenate([row["scores"] for row in firsts]).astype(np.float64),
        )
        clip = self.settings.advantage_clip
        each = np.repeat(found.clip(-clip, clip), self.settings.num_inference_steps)
        rows = [
            {**row, "advantage": value}
            for row, value in zip(whole.rows, each.tolist(), strict=True)
        ]
        items = whole.transitions
        return Rollout(
            Transitions(
                items.caption, items.number, items.chain, items.before, items.after,
                items.log_probability, torch.from_numpy(each).float(),
            ),
            rows,
        )  # fmt: skip
