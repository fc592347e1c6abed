"""Which GPUs a stage takes: free ones, held by file locks that the kernel releases with the process.

Snakemake counts GPUs and never says which one (snakemake issue 281), so eight jobs would all take the first.
A scheduler such as Slurm gives GPUs to an allocation, not to a stage: inside one (a Slurm job or a pod with
eight GPUs) all stages that Snakemake starts see the same devices. So a stage leases everywhere, among the
devices that it can see. Where a scheduler has shown it only its own, it has the lease at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from stages.core.execution.locks import try_lock

log = logging.getLogger(__name__)

_held: list[IO[str]] = []
"""Locks of this process, open until it ends."""


def lease_visible(num_devices: int = 1, *, jobs_per_device: int = 1) -> list[int]:
    """Places among torch's CUDA devices of so many that no other stage of ours holds.

    They are held until this process ends. With more than one job per device it is a slot of one
    device; see `lease`.
    """
    import torch

    words = visible_words(torch.cuda.device_count(), os.environ)
    names = [
        lock_name(word, str(torch.cuda.get_device_properties(place).uuid))
        for place, word in enumerate(words)
    ]
    places = lease(
        names,
        lock_folder(os.environ),
        num_devices=num_devices,
        jobs_per_device=jobs_per_device,
    )
    for place in places:
        log.info("leased GPU %s (%s)", words[place], names[place])
    return places


def visible_words(num_devices: int, environment: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each visible device, or would call it."""
    visible = promised_devices(environment)
    if len(visible) == num_devices:
        return visible
    return [str(index) for index in range(num_devices)]


def promised_devices(environment: Mapping[str, str]) -> list[str]:
    """The devices in CUDA_VISIBLE_DEVICES; none where it is not set or hides all of them."""
    words = [word.strip() for word in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return words if all(word not in ("", "-1", "NoDevFiles") for word in words) else []


def lock_name(word: str, uuid: str) -> str:
    """A device's name, the same in all processes of this machine.

    Its number is not the same in all of them, because cgroups may hide other devices. The parts of a
    GPU that is split by MIG have its UUID, but names of their own.
    """
    return word if word.startswith("MIG-") else uuid


def lock_folder(environment: Mapping[str, str]) -> Path:
    """Where this user's locks lie: on a local disk, because flock is reliable there.

    Each Slurm job has its own folder: if Slurm has given one GPU to two jobs, they are meant to share it.
    Pods have file systems of their own.
    """
    folder = Path(tempfile.gettempdir()) / f"sail-devices-{os.getuid()}"
    job = environment.get("SLURM_JOB_ID", "")
    return folder / f"slurm-{job}" if job.isdecimal() else folder


def lease(
    names: list[str],
    folder: Path,
    *,
    num_devices: int = 1,
    jobs_per_device: int = 1,
    poll_seconds: float = 0.5,
) -> list[int]:
    """Places among `names` of devices that nobody else holds, until this process ends.

    With jobs_per_device = n above 1 it leases one slot of the least loaded device. At most n jobs
    share a device, and never with a job that holds it alone.

    Waits until there are enough. All wait in one queue, and only the first in it looks for devices,
    so a job that wants several is not overtaken by jobs that want one. It takes all or none, so two
    jobs never wait for each other's devices. ValueError if there never can be enough.
    """
    if num_devices > len(names):
        raise ValueError(f"{num_devices} devices wanted, {len(names)} there")
    if num_devices > 1 and jobs_per_device > 1:
        raise ValueError(f"{num_devices} devices wanted to share; only one can be shared")
    folder.mkdir(parents=True, exist_ok=True)
    everyone = hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:16]
    with (folder / f"queue-{everyone}.lock").open("a") as queue:
        try:
            fcntl.flock(queue, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for %d of %d GPUs, behind others", num_devices, len(names))
            fcntl.flock(queue, fcntl.LOCK_EX)  # the kernel serves in the order of asking
        has_waited = False
        while True:
            if jobs_per_device > 1:
                found = _take_slot(names, folder, jobs_per_device)
            else:
                found = _take(names, folder, num_devices)
            if found is not None:
                return found
            if not has_waited:
                log.info("waiting for %d of %d GPUs; too few are free", num_devices, len(names))
                has_waited = True
            time.sleep(poll_seconds)


def _take(names: list[str], folder: Path, num_devices: int) -> list[int] | None:
    """Places of free devices, which are now held; None if too few are free, and then none is held."""
    files: dict[int, IO[str]] = {}
    for index, name in enumerate(names):
        if len(files) < num_devices:
            file = try_lock(_lock_of(folder, name))
            if file is not None:
                files[index] = file
    if len(files) < num_devices:
        for file in files.values():
            file.close()
        return None
    _keep(*files.values())
    return list(files)


def _take_slot(names: list[str], folder: Path, jobs_per_device: int) -> list[int] | None:
    """The place of the least loaded device with a free slot, which is now held; None if none is."""

    def slots(index: int) -> list[Path]:
        whole = _lock_of(folder, names[index])
        return [whole.with_suffix(f".slot{slot}.lock") for slot in range(jobs_per_device)]

    def load(index: int) -> int:
        return sum(map(_is_held, slots(index)))

    for index in sorted(range(len(names)), key=load):
        device = try_lock(_lock_of(folder, names[index]), leave_name=True, shared=True)
        if device is None:
            continue  # somebody has it alone
        for path in slots(index):
            slot = try_lock(path)
            if slot is not None:
                _keep(device, slot)
                return [index]
        device.close()
    return None


def _lock_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '-')}.lock"


def _is_held(path: Path) -> bool:
    file = try_lock(path, leave_name=True)
    if file is not None:
        file.close()
    return file is None


def _keep(*files: IO[str]) -> None:
    for file in files:
        os.set_inheritable(file.fileno(), True)  # a launcher's workers hold what it has leased
    _held.extend(files)
