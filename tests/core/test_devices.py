"""Device leases: distinct while held, free again when the holder dies."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import device_stress
from stages.core.devices import device_names, lease
from stages.core.locks import try_lock

HOLD = """
import sys, time
from pathlib import Path
from stages.core.devices import lease
print(*lease(sys.argv[3:], Path(sys.argv[1]), num_devices=int(sys.argv[2]), poll_seconds=0.05),
      flush=True)
time.sleep(60)
"""


def hold(folder: Path, *names: str, num_devices: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(num_devices), *names],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def leased(process: subprocess.Popen[str]) -> list[int]:
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def test_two_processes_get_two_devices_and_a_third_waits_until_one_is_killed(
    tmp_path: Path,
) -> None:
    first, second = hold(tmp_path, "4", "5"), hold(tmp_path, "4", "5")
    assert sorted(leased(first) + leased(second)) == [0, 1]
    third = hold(tmp_path, "4", "5")
    time.sleep(1.0)
    assert third.poll() is None
    kill(second)
    assert leased(third) in ([0], [1])
    for process in (first, third):
        assert process.poll() is None  # both still hold theirs
        kill(process)


def test_who_waits_for_two_is_not_overtaken_and_holds_nothing_meanwhile(tmp_path: Path) -> None:
    names = ("4", "5")
    one = hold(tmp_path, *names)
    assert leased(one) == [0]
    two = hold(tmp_path, *names, num_devices=2)
    time.sleep(1.0)
    late = hold(tmp_path, *names)  # device 5 is free, but it is not its turn
    time.sleep(1.0)
    assert (two.poll(), late.poll()) == (None, None)
    probe = try_lock(tmp_path / "5.lock")
    while probe is None:  # `two` looks at it twenty times a second
        probe = try_lock(tmp_path / "5.lock")
    probe.close()
    kill(one)
    assert leased(two) == [0, 1]
    kill(two)
    assert leased(late) in ([0], [1])
    kill(late)


def test_more_devices_than_there_are_is_an_error_and_not_a_wait_for_ever(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 devices wanted, 2 there"):
        lease(["0", "1"], tmp_path, num_devices=3)


@pytest.mark.slow
def test_200_jobs_on_8_devices_with_random_kills_never_overlap_and_none_is_lost(
    tmp_path: Path,
) -> None:
    found = device_stress.stress(tmp_path, jobs=200, devices=8, kill_share=0.15, seed=0)
    assert found.overlaps == 0
    assert found.lost == 0
    assert found.killed_holding > 0
    assert found.finished + found.killed == 200


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
