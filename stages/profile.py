r"""Where a stage's time goes: put this before a stage's line, as its log begins with it.

After the first item, whose time is not usual, some items are profiled; then the stage ends, and what it has
finished is kept where it keeps such things. A summary is printed, and the trace is written for
https://ui.perfetto.dev or chrome://tracing. Example:
    python -m stages.profile --items 3 --trace trace.json stages.score_candidates --candidates ...
"""

from __future__ import annotations

import argparse
import runpy
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from stages.core.errors import UserError
from stages.core.execution import runtime
from stages.core.execution.runtime import collect_garbage, set_up_log

LONGEST = 10
"""Operations that are listed."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls in which the CPU waits for the device."""


@dataclass
class Counters:
    """What this process has used so far."""

    wall: float
    cpu: float
    read: int
    written: int

    @classmethod
    def now(cls) -> Counters:
        """As of now."""
        files: Any = (
            psutil.Process().io_counters() if hasattr(psutil.Process, "io_counters") else None
        )
        read, written = (files.read_chars, files.write_chars) if files else (0, 0)
        return cls(time.perf_counter(), time.process_time(), read, written)


class Watch:
    """Profiles the items of a stage's progress from the second on, and then ends the stage."""

    def __init__(self, num_items: int) -> None:
        self.wanted, self.done = num_items, -1
        self.profiler: Any = None
        self.before: Counters | None = None
        self.after: Counters | None = None

    def __call__(self) -> None:
        """An item is done. SystemExit after the last one that is wanted."""
        self.done += 1
        if self.done == 0:
            self._start()
        elif self.done == self.wanted:
            self.stop()
            raise SystemExit(0)

    def stop(self) -> None:
        """Stop profiling, if it is on."""
        if self.before is None or self.after is not None:
            return
        _wait_for_device()
        self.after = Counters.now()
        self.profiler.stop()

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU]
        if _has_device():
            kinds.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=kinds)
        self.profiler.start()
        _wait_for_device()
        self.before = Counters.now()


def main(arguments: Sequence[str]) -> None:
    """Run a stage under a watch, then print the summary and write the trace.

    UserError for a stage that has fewer than two items, and where no stage is named.
    """
    parser = argparse.ArgumentParser(
        prog="python -m stages.profile", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--items", type=int, default=3, help="items to profile (default: 3)")
    parser.add_argument("--trace", type=Path, default=Path("trace.json"),
                        help="where the trace goes (default: trace.json)")  # fmt: skip
    parser.add_argument("stage", help="a stage, such as stages.sample_candidates")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the stage's own flags")
    args = parser.parse_args(list(arguments))
    if args.items < 1:
        raise UserError(f"--items must be at least 1, found {args.items}")
    if not args.stage.startswith("stages.") or find_spec(args.stage) is None:
        raise UserError(
            f"there is no stage {args.stage!r}; expected the name after `python -m` in a stage's log, as "
            "stages.score_candidates"
        )
    runtime.on_item = watch = Watch(args.items)
    sys.argv[1:] = args.flags
    try:
        runpy.run_module(args.stage, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise
    watch.stop()
    if watch.before is None or watch.after is None or watch.done < 1:
        raise UserError(
            f"{args.stage} has had fewer than two items of work, or none that it counts: nothing was profiled. Give "
            "it more prompts or pairs, or remove the output that it has finished."
        )
    watch.profiler.export_chrome_trace(str(args.trace))
    print(summary(watch))
    print(f"trace      {args.trace}: open it at https://ui.perfetto.dev")
    if watch.done == watch.wanted:
        print(
            "the stage was ended after these items; its own line, without stages.profile, goes on"
        )


def summary(watch: Watch) -> str:
    """What was seen, on one screen."""
    assert watch.before is not None
    assert watch.after is not None
    wall = watch.after.wall - watch.before.wall
    cpu = watch.after.cpu - watch.before.cpu
    events = watch.profiler.events()
    lines = [f"items      {watch.done} in {wall:.2f} s"]
    on_device = [event for event in events if _is_on_device(event)]
    if on_device:
        busy = covered((e.time_range.start, e.time_range.end) for e in on_device) / 1e6
        waited = sum(e.time_range.elapsed_us() for e in events if e.name in WAITS) / 1e6
        lines += [
            f"device     {100 * busy / wall:.0f} % busy",
            f"waiting    {waited:.2f} s of the CPU's time for the device ({100 * waited / wall:.0f} %)",
        ]
    lines += [
        f"CPU        {cpu:.2f} s, {100 * cpu / wall:.0f} % of one core",
        f"files      {(watch.after.read - watch.before.read) / 1e6:.1f} MB read, "
        f"{(watch.after.written - watch.before.written) / 1e6:.1f} MB written",
        f"memory     {runtime.peak_memory()} at most since the start",
    ]
    name = "self_device_time_total" if on_device else "self_cpu_time_total"
    averages = sorted(
        watch.profiler.key_averages(), key=lambda event: getattr(event, name), reverse=True
    )[:LONGEST]
    total = sum(getattr(event, name) for event in watch.profiler.key_averages()) or 1.0
    where = "on the device" if on_device else "on the CPU"
    lines.append(f"operations that took longest {where}:")
    lines += [
        f"  {100 * getattr(event, name) / total:5.1f} %  {getattr(event, name) / 1e3:9.1f} ms  "
        f"{event.count:6d} calls  {event.key[:70]}"
        for event in averages
    ]
    return "\n".join(lines)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _is_on_device(event: Any) -> bool:
    return str(event.device_type).endswith("CUDA")


def _has_device() -> bool:
    import torch

    return torch.cuda.is_available()


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    collect_garbage()
    set_up_log()
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
