"""Device leases: distinct while held, free again when the holder dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import device_stress
from stages.core.execution.devices import lease, lock_name, promised_devices, visible_words
from stages.core.execution.locks import try_lock

HOLD = """
import sys, time
from pathlib import Path
from stages.core.execution.devices import lease
print(*lease(sys.argv[4:], Path(sys.argv[1]), num_devices=int(sys.argv[2]),
             jobs_per_device=int(sys.argv[3]), poll_seconds=0.05), flush=True)
time.sleep(60)
"""


def hold(
    folder: Path, *names: str, num_devices: int = 1, jobs_per_device: int = 1
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(num_devices), str(jobs_per_device), *names],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def wait_until_queued(folder: Path) -> None:
    """Until some process heads the queue and waits for devices."""
    [queue] = folder.glob("queue-*.lock")
    while (probe := try_lock(queue, leave_name=True)) is not None:
        probe.close()
        time.sleep(0.05)


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


def test_jobs_that_share_fill_the_least_loaded_device_first_and_wait_when_all_are_full(
    tmp_path: Path,
) -> None:
    sharing = [hold(tmp_path, "4", "5", jobs_per_device=2)]
    places = leased(sharing[0])
    for _ in range(3):
        sharing.append(hold(tmp_path, "4", "5", jobs_per_device=2))
        places += leased(sharing[-1])
    assert places == [0, 1, 0, 1]
    late = hold(tmp_path, "4", "5", jobs_per_device=2)
    time.sleep(1.0)
    assert late.poll() is None
    kill(sharing[1])
    assert leased(late) == [1]
    for process in (sharing[0], *sharing[2:], late):
        kill(process)


def test_who_does_not_share_waits_for_all_who_do_and_is_not_overtaken(tmp_path: Path) -> None:
    sharing = [hold(tmp_path, "4", jobs_per_device=3) for _ in range(2)]
    assert [leased(process) for process in sharing] == [[0], [0]]
    training = hold(tmp_path, "4")
    wait_until_queued(tmp_path)
    late = hold(tmp_path, "4", jobs_per_device=3)  # a slot is free, but it is not its turn
    kill(sharing[0])
    time.sleep(1.0)
    assert (training.poll(), late.poll()) == (None, None)
    probe = try_lock(tmp_path / "4.lock", leave_name=True)
    assert probe is None
    kill(sharing[1])
    assert leased(training) == [0]
    time.sleep(1.0)
    probe = try_lock(tmp_path / "4.slot0.lock", leave_name=True)
    assert probe is not None  # `late` holds no slot beside the training
    probe.close()
    kill(training)
    assert leased(late) == [0]
    kill(late)


def test_several_devices_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 devices wanted to share"):
        lease(["0", "1"], tmp_path, num_devices=2, jobs_per_device=2)


def test_overlaps_are_counted_alone_and_beyond_what_may_share() -> None:
    span = device_stress.Span
    alone = [span(0, 1.0, 2.0, is_shared=False), span(0, 1.5, 3.0, is_shared=True)]
    assert device_stress.count_overlaps(alone, jobs_per_device=3) == 1
    shared = [span(0, start, 5.0, is_shared=True) for start in (1.0, 2.0, 3.0)]
    assert device_stress.count_overlaps(shared, jobs_per_device=3) == 0
    assert device_stress.count_overlaps(shared, jobs_per_device=2) == 1
    later = [span(1, 0.0, 1.0, is_shared=False), span(1, 1.0, 2.0, is_shared=False)]
    assert device_stress.count_overlaps(later, jobs_per_device=1) == 0


@pytest.mark.slow
def test_shared_and_exclusive_jobs_with_random_kills_never_exceed_a_devices_slots(
    tmp_path: Path,
) -> None:
    found = device_stress.stress(
        tmp_path,
        jobs=120,
        devices=4,
        kill_share=0.3,
        seed=1,
        jobs_per_device=3,
        longest_seconds=1.0,
    )
    assert found.overlaps == 0
    assert found.lost == 0
    assert 2 <= found.most_shared <= 3
    assert found.killed_holding > 0
    assert found.finished + found.killed == 120


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
def test_a_launcher_shows_its_processes_devices_in_the_words_that_it_was_shown_them_in(
    visible: dict[str, str], count: int, expected: list[str]
) -> None:
    assert visible_words(count, visible) == expected


@pytest.mark.parametrize("nothing", ["", "-1", "NoDevFiles", "0,,1"])
def test_no_device_is_promised_where_none_is_named(nothing: str) -> None:
    assert promised_devices({"CUDA_VISIBLE_DEVICES": nothing}) == []
    assert promised_devices({}) == []


def test_a_part_of_a_gpu_has_a_name_of_its_own() -> None:
    assert lock_name("MIG-11", "aaaa") != lock_name("MIG-22", "aaaa")
    assert lock_name("0", "aaaa") == lock_name("GPU-aaaa", "aaaa")


STAGE = """
import sys, time
from types import ModuleType, SimpleNamespace
devices = sys.argv[1].split(",")
sys.modules["torch"] = torch = ModuleType("torch")
torch.cuda = SimpleNamespace(
    device_count=lambda: len(devices),
    get_device_properties=lambda place: SimpleNamespace(uuid=devices[place]),
)
from stages.core.execution.devices import lease_visible
[place] = lease_visible()
sys.stdout.write(f"{devices[place]}\\n")  # in one piece: others write beside it
sys.stdout.flush()
time.sleep(60)
"""
"""Leases one of the pretend GPUs that it sees, and holds it."""

IN_ONE = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0,1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def see(
    folder: Path, environment: dict[str, str], *devices: str, script: str = STAGE
) -> subprocess.Popen[str]:
    """A stage that sees these GPUs, in this order, with a scheduler's variables."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "CUDA_"))}
    return subprocess.Popen(
        [sys.executable, "-c", script, ",".join(devices)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        env={**mine, "TMPDIR": str(folder), **environment},
    )


@pytest.mark.parametrize("environment", [{}, IN_ONE, POD], ids=["bare", "slurm", "pod"])
def test_stages_that_see_the_same_two_gpus_take_one_each(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    stages = [see(tmp_path, environment, *order) for order in (("aa", "bb"), ("bb", "aa"))]
    assert sorted(device_of(stage) for stage in stages) == ["aa", "bb"]
    third = see(tmp_path, environment, "aa", "bb")
    time.sleep(1.0)
    assert third.poll() is None
    kill(stages[0])
    assert device_of(third) in ("aa", "bb")
    kill(third)
    kill(stages[1])


@pytest.mark.parametrize(
    ("jobs", "devices"),
    [(("7", "8"), ("aa", "bb")), (("7", "7"), ("aa", "bb")), (("7", "8"), ("aa", "aa"))],
    ids=["two jobs", "two steps of a job", "two jobs that share a GPU"],
)
def test_who_was_shown_one_gpu_as_number_0_takes_it_at_once(
    tmp_path: Path, jobs: tuple[str, str], devices: tuple[str, str]
) -> None:
    stages = [
        see(tmp_path, {"SLURM_JOB_ID": job, "CUDA_VISIBLE_DEVICES": "0"}, device)
        for job, device in zip(jobs, devices, strict=True)
    ]
    assert tuple(device_of(stage) for stage in stages) == devices
    for stage in stages:
        kill(stage)


LAUNCHER = (
    STAGE.partition("from stages")[0]
    + """
from stages.launch import visible_devices
print(visible_devices(2)["CUDA_VISIBLE_DEVICES"], flush=True)
time.sleep(60)
"""
)
"""As `stages.launch 2` does before it starts its processes."""


def test_a_launcher_shows_its_processes_two_gpus_that_no_other_stage_of_the_job_holds(
    tmp_path: Path,
) -> None:
    environment = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "4,5,6"}
    one = see(tmp_path, environment, "aa", "bb", "cc")
    assert device_of(one) == "aa"
    two = see(tmp_path, environment, "aa", "bb", "cc", script=LAUNCHER)
    assert device_of(two) == "5,6"
    kill(one)
    kill(two)


def device_of(stage: subprocess.Popen[str]) -> str:
    assert stage.stdout is not None
    return stage.stdout.readline().strip()
