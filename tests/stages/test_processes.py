"""Training in two processes: the losses of one, noise of its own for each, and no lost work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages import train_seed
from stages.core.artifacts.provenance import policy_digest
from stages.core.training.settings import Execution
from tests.builders import LORA, read_rows

ROOT = Path(__file__).resolve().parents[2]


def words(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A stage's arguments as its command line."""
    for name, value in values.items():
        flag = f"{prefix}{name}".replace("_", "-")
        if isinstance(value, Mapping):
            yield from words(value, f"{flag}.")
        elif isinstance(value, list | tuple):
            yield from (f"--{flag}", *map(str, value)) if value else ()
        elif isinstance(value, bool):
            yield (
                f"--{flag}"
                if value
                else f"--{flag.rpartition('.')[0]}{'.' * ('.' in flag)}no-{flag.rpartition('.')[2]}"
            )
        else:
            yield from (f"--{flag}", str(value))


def start(args: train_seed.Args, processes: int, *launcher: str) -> subprocess.Popen[str]:
    launcher = (*launcher, "-m") if launcher else ("stages.launch", str(processes))
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "stages.train_seed", *words(asdict(args))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def elsewhere(args: train_seed.Args, folder: Path, **settings: Any) -> train_seed.Args:
    return replace(
        args,
        settings=replace(args.settings, **settings),
        output=folder / "policy",
        training=folder / "training.parquet",
        held_out_curve=folder / "held_out_curve.parquet",
        work=folder / "work",
    )


def without_speed(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "pairs_per_second"} for row in read_rows(path)]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    args = elsewhere(seed_trained, tmp_path)
    output = finish(start(args, 2))
    assert "training on 2 processes" in output
    assert output.count("train_seed: done") == 1  # only the main process speaks
    found, expected = without_speed(args.training), without_speed(seed_trained.training)
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    policy_digest(args.output)


@pytest.mark.slow
def test_two_processes_train_a_lora_in_micro_batches_as_one_does_at_once(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    alone, shared = (
        replace(elsewhere(seed_trained, tmp_path / name, batch_pairs=4), lora=LORA)
        for name in ("alone", "shared")
    )
    train_seed.main(alone)
    finish(start(replace(shared, execution=Execution(micro_batch_pairs=1)), 2))
    found, expected = without_speed(shared.training), without_speed(alone.training)
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    weights, others = (
        load_file(args.output / "pytorch_lora_weights.safetensors") for args in (shared, alone)
    )
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_accelerate_launch_works_too_and_two_jobs_at_once_do_not_collide(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    one, two = (elsewhere(seed_trained, tmp_path / name) for name in ("one", "two"))
    launcher = (
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
    )
    jobs = [start(one, 2, *launcher), start(two, 2)]
    for job in jobs:
        assert "training on 2 processes" in finish(job)
    assert without_speed(one.training) == without_speed(two.training)
    assert policy_digest(one.output) == policy_digest(two.output)


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_refused(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    process = start(elsewhere(seed_trained, tmp_path, batch_pairs=3), 2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "batch_pairs is 3, which 2 processes cannot share equally" in " ".join(output.split())
    assert not (tmp_path / "policy").exists()


@pytest.mark.slow
def test_a_killed_launcher_takes_its_workers_with_it(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    args = replace(
        elsewhere(seed_trained, tmp_path, passes=10_000.0), execution=Execution(save_every=1)
    )
    launcher = start(args, 2)

    def workers() -> list[str]:
        found = subprocess.run(["pgrep", "-f", str(args.work)], capture_output=True, text=True)
        return [pid for pid in found.stdout.split() if pid != str(launcher.pid)]

    await_state(args, launcher)
    assert len(workers()) == 2
    launcher.kill()
    launcher.communicate()
    deadline = time.monotonic() + 30
    while workers():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def await_state(args: train_seed.Args, process: subprocess.Popen[str]) -> None:
    """Wait until the training has saved a state."""
    deadline = time.monotonic() + 240
    while not (args.work / "state.json").is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_and_run_again_two_processes_end_with_the_weights_of_an_unbroken_run(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    often = Execution(save_every=3)
    unbroken, broken = (
        replace(elsewhere(seed_trained, tmp_path / name, passes=20.0), execution=often)
        for name in ("unbroken", "broken")
    )
    finish(start(unbroken, 2))
    process = start(broken, 2)
    await_state(broken, process)
    subprocess.run(["pkill", "-KILL", "-f", str(broken.work)], check=True)  # launcher and workers
    process.communicate()
    assert not broken.output.exists()
    assert "continuing from step" in finish(start(broken, 2))
    assert policy_digest(broken.output) == policy_digest(unbroken.output)
    assert without_speed(broken.training) == without_speed(unbroken.training)
    assert read_rows(broken.held_out_curve) == read_rows(unbroken.held_out_curve)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_sigterm_has_a_training_save_its_state_and_the_next_call_ends_with_the_same_weights(
    seed_trained: train_seed.Args, tmp_path: Path, processes: int
) -> None:
    """SIGTERM as Slurm and spot instances send it; no state but this one is saved after the first."""
    unbroken, broken = (
        replace(elsewhere(seed_trained, tmp_path / name, passes=30.0), execution=often)
        for name, often in (("unbroken", Execution()), ("broken", Execution(save_every=7)))
    )
    finish(start(unbroken, processes))
    process = start(broken, processes)
    await_state(broken, process)
    asked = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert time.monotonic() - asked < 30  # the grace period that Slurm gives by default
    [step] = re.findall(r"stopped by SIGTERM: the training's state of step (\d+) is saved", output)
    assert 7 <= int(step) < 60
    assert not broken.output.exists()
    assert f"continuing from step {step} " in finish(start(broken, processes))
    assert policy_digest(broken.output) == policy_digest(unbroken.output)
    assert without_speed(broken.training) == without_speed(unbroken.training)
    assert read_rows(broken.held_out_curve) == read_rows(unbroken.held_out_curve)
