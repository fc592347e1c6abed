"""Which GPUs a stage takes: free ones, held by file locks that the kernel releases with the process.

Snakemake counts GPUs and never says which one (snakemake issue 281), so that eight jobs would all take
the first.
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

from stages.core.locks import try_lock

log = logging.getLogger(__name__)

SCHEDULERS = ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "LOCAL_RANK")
"""Where one of these is set, somebody else has handed out the devices already."""

_held: list[IO[str]] = []
"""Locks of this process, open until it ends."""


def device_names(num_devices: int, environment: Mapping[str, str]) -> list[str]:
    """A name for each visible device that other processes of this machine use for it too."""
    visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if len(visible) == num_devices and all(visible):
        return visible
    return [str(index) for index in range(num_devices)]


def lock_folder() -> Path:
    """Where this user's locks lie: on a local disk, where flock can be relied on."""
    return Path(tempfile.gettempdir()) / f"sail-devices-{os.getuid()}"


def lease(
    names: list[str],
    folder: Path,
    *,
    num_devices: int = 1,
    jobs_per_device: int = 1,
    poll_seconds: float = 0.5,
) -> list[int]:
    """Places among `names` of devices that nobody else holds, until this process ends.

    With more than one job per device it is one device, the least loaded, beside at most so many less
    one others that share as well, and never beside one that does not.

    Waits until there are enough. Who waits for several is not overtaken by those who want one: all
    queue at one lock, and only the first in the queue looks for devices. It takes all or none, so
    that two who wait for each other's devices cannot be. ValueError if there never can be enough.
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
    """Places of free devices, now held; None, and none held, if too few are free."""
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
