"""A killed Snakemake's lock goes away by itself; a living one's, or another host's, stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.errors import UserError
from stages.core.execution.snakemake_lock import HEADS, free_stale_lock, hold_run

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys
from pathlib import Path
from stages.core.execution.snakemake_lock import free_stale_lock
held, _ = free_stale_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


def locked(folder: Path) -> list[Path]:
    """What a Snakemake at work has in a folder."""
    locks = folder / ".snakemake" / "locks"
    locks.mkdir(parents=True)
    paths = [locks / "0.input.lock", locks / "0.output.lock"]
    for path in paths:
        path.write_text("results/table.parquet\n")
    return paths


def head(folder: Path) -> subprocess.Popen[str]:
    """A Snakemake at work in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_killed_one_s_locks_are_removed_and_a_living_one_s_are_not(tmp_path: Path) -> None:
    first, second = head(tmp_path), head(tmp_path)
    paths = locked(tmp_path)
    first.kill()
    first.communicate()
    file, removed = free_stale_lock(tmp_path)  # the second is still at work
    assert file is not None
    assert removed == 0
    assert all(path.is_file() for path in paths)
    file.close()
    second.kill()
    second.communicate()
    file, removed = free_stale_lock(tmp_path)
    assert removed == 2
    assert not any(path.exists() for path in paths)
    assert file is not None
    file.close()


def test_the_locks_of_a_folder_where_another_host_has_run_stay(tmp_path: Path) -> None:
    paths = locked(tmp_path)
    heads = tmp_path / ".snakemake" / HEADS
    heads.mkdir()
    (heads / "another-host.lock").touch()
    file, removed = free_stale_lock(tmp_path)
    assert removed == 0
    assert all(path.is_file() for path in paths)
    assert file is not None
    file.close()


def test_the_locks_of_one_that_left_no_sign_of_its_host_stay(tmp_path: Path) -> None:
    paths = locked(tmp_path)
    file, removed = free_stale_lock(tmp_path)
    assert removed == 0
    assert all(path.is_file() for path in paths)
    assert file is not None
    file.close()


def test_a_run_has_one_snakemake_at_a_time_and_another_run_may_have_another(tmp_path: Path) -> None:
    first = hold_run(tmp_path, "one")
    assert first is not None
    with pytest.raises(
        UserError, match=rf"process {os.getpid()}, makes the run 'one' in this folder"
    ):
        hold_run(tmp_path, "one")
    other = hold_run(tmp_path, "two")
    assert other is not None
    first.close()
    again = hold_run(tmp_path, "one")
    assert again is not None
    again.close()
    other.close()
