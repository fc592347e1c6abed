"""Kills what runs a DAG, again and again, and compares what comes out with an unbroken run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from stages.core.artifacts.files import write_json
from stages.core.health.jobs import command_line, stage_name
from tests.chaos.contents import contents, differences
from tests.workflow.projects import RUN, Project, environment

CONFIG: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("config.yaml").read_text())

KINDS = {"stage": 2, "group": 1, "head": 1}
"""One stage's process; Snakemake and all that it started; Snakemake alone. How often, in parts."""

EARLY_SHARE = 0.25
"""Of the starts: kill also before the first stage is at work, which else takes most of the kills."""


@dataclass(frozen=True)
class Aim:
    """A kill that is not left to chance: its kind, the stage that is at work, and the moment."""

    kind: str
    stage: str
    state: str = ""
    """The saved state that a training must have, in the run's folder; else the stage must have begun its work."""


AIMS = (
    Aim("stage", "shapes.make_preferences"),
    Aim("group", "encode_preferences"),
    Aim("head", "train_seed", state=f"work/{RUN}/iter00/state.json"),
    Aim("stage", "sample_candidates"),
    Aim("head", "score_candidates"),
    Aim("stage", "update_policy", state=f"work/{RUN}/iter01/state.json"),
    Aim("group", "generate_evaluation"),
    Aim("stage", "export_policy"),
)
"""Every kind of kill, and every way in which a stage keeps what it has: a table, mapped tensors, a training's state,
finished batches of images and of rewards, a policy's folder, an export's. In the order in which a run comes to them."""

SECONDS_TO_END = 60.0
"""After a Snakemake has gone, its last stage must be gone by then."""


@dataclass
class Tally:
    """What has happened so far; survives the harness itself being killed."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    """Of each: its kind, and the stages that it ended."""
    starts: int = 0
    """How often Snakemake was started."""
    completed: int = 0
    """Runs that came to their end after kills and were compared."""
    files: int = 0
    """Files compared in each."""
    resumed: int = 0
    """Trainings that went on from a saved state."""
    losses: list[str] = field(default_factory=list)
    """Everything that went wrong: differences, failures without a kill, stages left behind."""
    seconds: float = 0.0
    """Wall time."""


class Harness:
    """One unbroken run, and another that is killed in: as aimed first, then at random."""

    def __init__(
        self, folder: Path, *, seed: int, mean_seconds: float, aims: Sequence[Aim] = ()
    ) -> None:
        self.folder, self.seed, self.mean_seconds, self.aims = folder, seed, mean_seconds, aims
        self.unbroken = Project(folder / "unbroken")
        self.killed = Project(folder / "killed")
        self.path = folder / "tally.json"
        self.tally = Tally(**json.loads(self.path.read_text())) if self.path.is_file() else Tally()

    def run(self, kills: int) -> Tally:
        """Kill until there have been so many, let the last run come to its end, and compare."""
        expected = self._expected()
        self.tally.files = len(expected)
        self.killed.folder.mkdir(parents=True, exist_ok=True)
        end_all(self.killed.folder)  # what a killed harness has left
        while len(self.tally.kills) < kills or self._has_begun():
            started = time.monotonic()
            is_complete = self._start_and_kill(kills)
            if is_complete:
                self._compare(expected)
            self.tally.seconds += time.monotonic() - started
            self._save()
        return self.tally

    def _expected(self) -> dict[str, str]:
        """The contents of the unbroken run, which is made once."""
        path = self.folder / "unbroken.json"
        if not path.is_file():
            shutil.rmtree(self.unbroken.folder, ignore_errors=True)
            self.unbroken.folder.mkdir(parents=True)
            self.unbroken.make("--quiet", "all", config=CONFIG)
            write_json(path, contents(self.unbroken.results))
        expected: dict[str, str] = json.loads(path.read_text())
        return expected

    def _has_begun(self) -> bool:
        return self.killed.results.exists()

    def _start_and_kill(self, kills: int) -> bool:
        """Start Snakemake as a user would, once more, and kill in it; whether it came to its end."""
        rng = random.Random(f"{self.seed} {self.tally.starts} {len(self.tally.kills)}")
        self.tally.starts += 1
        before = len(self.tally.kills)
        log = self.folder / "last.log"
        with log.open("w") as file:
            head = subprocess.Popen(
                self.killed.command("--quiet", "rules", config=CONFIG),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
            while head.poll() is None and len(self.tally.kills) < len(self.aims):
                self._kill_as_aimed(head, rng)
            if rng.random() > EARLY_SHARE:
                self._await_stage(head)
            while head.poll() is None:
                limit = None
                if len(self.tally.kills) < kills:
                    limit = rng.expovariate(1 / self.mean_seconds)
                try:
                    head.wait(timeout=limit)
                except subprocess.TimeoutExpired:
                    self._kill_at_random(head, rng)
        self.tally.resumed += log.read_text(errors="replace").count("continuing from step")
        if head.returncode != 0 and len(self.tally.kills) == before:
            kept = self.folder / f"failure-{self.tally.starts}.log"
            shutil.copy(log, kept)
            self._lose(f"start {self.tally.starts} failed though nothing was killed ({kept})")
            if sum("failed though" in loss for loss in self.tally.losses) > 5:
                raise SystemExit(f"it fails again and again: {kept}")
        return head.returncode == 0

    def _await_stage(self, head: subprocess.Popen[bytes]) -> None:
        while head.poll() is None and not any(stages_in(self.killed.folder)):
            time.sleep(0.2)

    def _kill_as_aimed(self, head: subprocess.Popen[bytes], rng: random.Random) -> None:
        """Wait for the next aim's stage and moment, and kill; or return when Snakemake has ended."""
        aim = self.aims[len(self.tally.kills)]
        while head.poll() is None:
            for stage in stages_in(self.killed.folder):
                if stage_name(command_line(stage)) == aim.stage and self._is_moment(aim, stage):
                    time.sleep(rng.uniform(0, 0.2))
                    self._kill(head, aim.kind, [stage] if aim.kind == "stage" else None)
                    return
            time.sleep(0.05)

    def _is_moment(self, aim: Aim, stage: psutil.Process) -> bool:
        """Whether a stage is as far as the aim wants it, by its own log or by the state it has saved."""
        if aim.state:
            return (self.killed.folder / aim.state).is_file()
        begins = re.compile(rf"\b{aim.stage.rpartition('.')[2]}\b[^:]*: begins")
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            return any(
                log.stat().st_mtime >= stage.create_time() and begins.search(log.read_text())
                for log in self.killed.logs.rglob("*.log")
            )
        return False

    def _kill_at_random(self, head: subprocess.Popen[bytes], rng: random.Random) -> None:
        stages = list(stages_in(self.killed.folder))
        kinds = {kind: parts for kind, parts in KINDS.items() if stages or kind != "stage"}
        [kind] = rng.choices(list(kinds), weights=list(kinds.values()))
        self._kill(head, kind, [rng.choice(stages)] if kind == "stage" else stages)

    def _kill(
        self, head: subprocess.Popen[bytes], kind: str, victims: list[psutil.Process] | None
    ) -> None:
        """Send SIGKILL to a stage, to everything, or to Snakemake alone; note what was at work.

        Without victims these are the stages at work.
        """
        victims = list(stages_in(self.killed.folder)) if victims is None else victims
        names = [stage_name(command_line(victim)) or "?" for victim in victims]
        try:
            if kind == "stage":
                victims[0].kill()
            elif kind == "group":
                os.killpg(head.pid, signal.SIGKILL)
            else:
                head.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            return  # it has ended by itself at this very moment
        self.tally.kills.append({"kind": kind, "stages": names, "run": self.tally.completed})
        if kind != "stage":
            head.wait()
        self._save()

    def _compare(self, expected: dict[str, str]) -> None:
        """Compare a run that came to its end, and clear the place for the next one."""
        if left := wait_for_all(self.killed.folder):
            self._lose(f"{len(left)} processes left behind after run {self.tally.completed}")
            end_all(self.killed.folder)
        for difference in differences(expected, contents(self.killed.results)):
            self._lose(f"run {self.tally.completed}: {difference}")
        self.tally.completed += 1
        if self.tally.losses:
            kept = self.folder / f"run-{self.tally.completed}"
            shutil.copytree(self.killed.folder, kept, dirs_exist_ok=True)
        shutil.rmtree(self.killed.folder)
        self.killed.folder.mkdir()

    def _lose(self, what: str) -> None:
        print(what, flush=True)
        self.tally.losses.append(what)

    def _save(self) -> None:
        write_json(self.path, asdict(self.tally))


def stages_in(folder: Path) -> Iterator[psutil.Process]:
    """The stages at work in a folder."""
    for process in processes_in(folder):
        if stage_name(command_line(process)):
            yield process


def processes_in(folder: Path) -> Iterator[psutil.Process]:
    """All processes whose working directory a folder is."""
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder.resolve()):
                yield process
        except psutil.Error:
            continue


def wait_for_all(folder: Path) -> list[psutil.Process]:
    """The processes of a folder that have not ended in time."""
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := list(processes_in(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def end_all(folder: Path) -> None:
    """Kill whatever is at work in a folder of our own."""
    for process in processes_in(folder):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
