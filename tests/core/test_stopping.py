"""A stage ends on SIGTERM, and when its Snakemake is gone; what is deferred ends where it chooses."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.execution.stopping import EXIT_CODE, SNAKEMAKE, Stop, Stopped

ROOT = Path(__file__).resolve().parents[2]

WRITE_SLOWLY = """
import sys, time
from pathlib import Path
from stages.core.artifacts.files import replacing
from stages.core.execution.runtime import run_stage
from stages.core.execution.stopping import STOP
def main(path):
    with replacing(path) as part:
        part.write_text("half")
        print("at work", flush=True)
        time.sleep(60)
run_stage(main, Path(sys.argv[1]))
"""


def write_slowly(path: Path, snakemake: int | str = "") -> subprocess.Popen[str]:
    """A stage that is at work; its Snakemake is the process of that id."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_SLOWLY, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, SNAKEMAKE: str(snakemake)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


def test_sigterm_ends_a_stage_with_a_message_and_nothing_half_written(tmp_path: Path) -> None:
    process = write_slowly(tmp_path / "table.parquet")
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=30)
    assert process.returncode == EXIT_CODE == 143
    assert message.splitlines()[-1] == (
        "stopped by SIGTERM: nothing half-written was left; run again to continue"
    )
    assert not list(tmp_path.iterdir())


def test_a_stage_ends_with_the_snakemake_that_started_it(tmp_path: Path) -> None:
    snakemake = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = write_slowly(tmp_path / "table.parquet", snakemake.pid)
    assert process.poll() is None
    snakemake.kill()
    snakemake.communicate()
    process.communicate(timeout=30)
    assert process.returncode == EXIT_CODE
    assert not list(tmp_path.iterdir())


def test_a_stage_ends_with_the_shell_that_snakemake_started_it_in(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_SLOWLY, str(tmp_path / "table.parquet")]
    shell = subprocess.Popen(
        ["bash", "-c", f"{shlex.join(command)}; true"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, SNAKEMAKE: str(os.getpid())},
    )
    assert shell.stdout is not None
    assert shell.stdout.readline() == "at work\n"
    shell.kill()
    _, message = shell.communicate(timeout=30)  # until the stage has closed it too
    assert "stopped by SIGTERM" in message
    assert not list(tmp_path.iterdir())


def test_a_stage_started_after_its_snakemake_s_end_ends_too(tmp_path: Path) -> None:
    snakemake = subprocess.Popen([sys.executable, "-c", ""])
    snakemake.wait()
    process = subprocess.run(
        [sys.executable, "-c", WRITE_SLOWLY, str(tmp_path / "table.parquet")],
        cwd=ROOT,
        env={**os.environ, SNAKEMAKE: str(snakemake.pid)},
        timeout=30,
        check=False,
    )
    assert process.returncode == EXIT_CODE


def test_what_is_deferred_is_only_noted() -> None:
    stop = Stop()
    with stop.deferred():
        assert not stop.is_asked
        stop.ask(signal.SIGTERM, None)
        assert stop.is_asked
    with pytest.raises(Stopped, match="nothing half-written"):
        stop.ask(signal.SIGTERM, None)
