"""Which GPU a stage takes: a free one, held by a file lock that the kernel releases with the process.

Snakemake counts GPUs and never says which one (snakemake issue 281), so that eight jobs would all take
the first.
"""

from __future__ import annotations

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


def lease(names: list[str], folder: Path, *, poll_seconds: float = 0.5) -> int:
    """Place among `names` of a device that nobody holds; waits until there is one."""
    has_waited = False
    while True:
        for index, name in enumerate(names):
            file = try_lock(folder / f"{name.replace('/', '-')}.lock")
            if file is not None:
                _held.append(file)
                return index
        if not has_waited:
            log.info("waiting for one of %d GPUs; all are taken", len(names))
            has_waited = True
        time.sleep(poll_seconds)
