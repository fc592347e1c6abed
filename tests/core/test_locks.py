"""Locks: one holder at a time, and none that outlives its process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.execution.locks import held, try_lock

HOLD = """
import sys, time
from pathlib import Path
from stages.core.execution.locks import held
with held(Path(sys.argv[1]), "here", poll_seconds=0.05):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )


def test_a_lock_is_one_process_s_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "work.lock"
    with held(path, "here"):
        assert path.read_text() == f"{os.getpid()}\n"
        assert try_lock(path) is None
    file = try_lock(path)
    assert file is not None
    file.close()


def test_a_killed_holder_s_lock_is_free(tmp_path: Path) -> None:
    path = tmp_path / "work.lock"
    other = hold(path)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    assert try_lock(path) is None
    other.kill()
    other.communicate()
    file = try_lock(path)
    assert file is not None
    file.close()


def test_who_waits_is_told_whom_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "work.lock"
    other = hold(path)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            other.kill()

    told = Told()
    logging.getLogger("stages.core.execution.locks").addHandler(told)
    try:
        with caplog.at_level(logging.INFO), held(path, "work/run/iter00", poll_seconds=0.05):
            pass
    finally:
        logging.getLogger("stages.core.execution.locks").removeHandler(told)
    other.communicate()
    assert f"waiting for process {other.pid}, which is at work in work/run/iter00" in caplog.text
