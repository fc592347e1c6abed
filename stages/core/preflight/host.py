"""Memory of the machine beside its devices: what the processes of a run hold at once."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from stages.core.plan.costs import Counts, Rates
from stages.core.preflight.findings import Findings

GB = 1e9
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container or a job of a cluster is told its limit, by versions 2 and 1 of cgroups."""
MOST = 0.95
"""Share of the memory that may be taken."""


def check_host_memory(
    counts: Counts, rates: Rates, config: Mapping[str, Any], findings: Findings, *, devices: int
) -> None:
    """Note what a training's processes and the small stages hold at once, and whether the machine has it.

    A process is taken for as large as this one has been, which has loaded every part, sampled, scored and trained.
    """
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    available = memory_limit()
    for what, held in held_bytes(counts, rates, config, process, devices=devices).items():
        findings.add(
            f"host memory, {what}", f"{held / GB:.1f} of {available / GB:.1f} GB",
            holds=held < MOST * available,
        )  # fmt: skip


def held_bytes(
    counts: Counts, rates: Rates, config: Mapping[str, Any], process: int, *, devices: int
) -> dict[str, int]:
    """Bytes in memory of all processes of a training, and of the jobs that score shards at once.

    A training that continues reads its whole state first; its pairs lie on the disk. A scoring job holds its shard's
    latents, or its images where it encodes them again. Each process of an online training holds a round's steps, twice
    while they are put together.
    """
    execution = config["execution"]
    is_reencoded = config["score_candidates"]["reencode"]
    image = rates.candidate_bytes if is_reencoded else rates.latents_bytes
    shard = math.ceil(counts.candidates_of_an_iteration / config["sample_candidates"]["shards"])
    jobs = max(1, devices) * execution["jobs_per_gpu"]
    training = process + rates.trained_bytes
    held = {
        "training": execution["training_gpus"] * training,
        "scoring": jobs * (process + shard * image),
    }
    if counts.online_round is not None:
        kept = 2 * counts.online_round.kept_latents * rates.latents_bytes
        held["online training"] = execution["training_gpus"] * (training + kept)
    return held


def memory_limit(limits: tuple[str, ...] = LIMITS) -> int:
    """Bytes of memory that this process may use: the machine's, or less where its group has a limit."""
    found = [int(psutil.virtual_memory().total)]
    for limit in limits:
        text = Path(limit).read_text().strip() if Path(limit).is_file() else ""
        if text.isdecimal():  # 'max' is no limit
            found.append(int(text))
    return min(found)
