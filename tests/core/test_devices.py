"""Device leases: distinct while held, free again when the holder dies."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.core.devices import device_names

HOLD = """
import sys, time
from pathlib import Path
from stages.core.devices import lease
print(lease(sys.argv[2:], Path(sys.argv[1]), poll_seconds=0.05), flush=True)
time.sleep(60)
"""


def hold(folder: Path, *names: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *names],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def leased(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_two_processes_get_two_devices_and_a_third_waits_until_one_is_killed(
    tmp_path: Path,
) -> None:
    first, second = hold(tmp_path, "4", "5"), hold(tmp_path, "4", "5")
    assert {leased(first), leased(second)} == {0, 1}
    third = hold(tmp_path, "4", "5")
    time.sleep(1.0)
    assert third.poll() is None
    kill(second)
    freed = leased(third)
    assert freed in (0, 1)
    for process in (first, third):
        assert process.poll() is None  # both still hold theirs
        kill(process)


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        ({}, 2, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "6,7"}, 2, ["6", "7"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-aa, GPU-bb"}, 2, ["GPU-aa", "GPU-bb"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, ["0"]),
    ],
)
def test_names_are_those_that_other_processes_use(
    visible: dict[str, str], count: int, expected: list[str]
) -> None:
    assert device_names(count, visible) == expected
