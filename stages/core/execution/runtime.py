"""What every stage does around its work: threads, device, log, progress, and a closing line."""

from __future__ import annotations

import gc
import logging
import os
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from stages.core.errors import UserError
from stages.core.execution.devices import lease_visible, promised_devices
from stages.core.execution.stopping import EXIT_CODE, Stopped, heed_signals

if TYPE_CHECKING:
    import torch

log = logging.getLogger("sail")
Item = TypeVar("Item")
Args = TypeVar("Args")

on_item: Callable[[], None] | None = None
"""Called after each item of a progress; `stages.profile` sets it."""
PROGRESS_SECONDS = 10.0
"""Where nobody watches a terminal, one progress line this often."""


@dataclass
class Run:
    """What a stage has read and written so far."""

    name: str
    rows_in: int = 0
    rows_out: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self.started


_whose: list[str] = []
"""What this process works on, for its lines: of two shards that run at once, which says this."""


def work_of(args: object) -> str:
    """What a stage's arguments say it works on: 'iter01 shard 0', 'iter02 pickscore', or nothing."""
    words = []
    iteration, policy = getattr(args, "iteration", None), getattr(args, "policy", None)
    if isinstance(iteration, int):
        words.append(f"iter{iteration:02d}")
    elif policy is not None:
        path = Path(str(policy))
        words.append(path.parent.name if path.name == "policy" else path.name)
    if (metric := getattr(args, "metric", None)) is not None:
        words.append(str(metric))
    output = Path(str(getattr(args, "output", "")))
    if output.stem.startswith("shard-"):
        words.append(output.stem.replace("-", " "))
    return " ".join(words)


@contextmanager
def stage(name: str) -> Iterator[Run]:
    """Set up logging; say that it begins; end with rows in, rows out, seconds and peak memory."""
    set_up_log()
    run = Run(name)
    whose = " ".join([name, *_whose])
    log.info("%s: begins", whose)
    yield run
    log.info(
        "%s: done, %d rows in, %d rows out, %.1f s, peak memory %s",
        whose, run.rows_in, run.rows_out, run.seconds, peak_memory(),
    )  # fmt: skip


def run_stage(main: Callable[[Args], None], args: Args) -> None:
    """Call a stage's main; a mistake of the user's ends in a message, not in a traceback."""
    collect_garbage()
    set_up_log()
    spec = sys.modules["__main__"].__spec__
    if spec is not None:
        log.info("python -m %s %s", spec.name, shlex.join(sys.argv[1:]))
    try:
        heed_signals()
        _whose[:] = filter(None, [work_of(args)])
        main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except PermissionError as error:
        print(f"error: {error.filename}: this user may not read or write it", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if _is_main():
            print("stopped: what is done is kept; the same command continues", file=sys.stderr)
        raise SystemExit(130) from None
    except Stopped as stopped:
        if _is_main():
            print(f"stopped by SIGTERM: {stopped}; run again to continue", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


def collect_garbage() -> None:
    """Look for garbage from here on, but not in what was imported (`stages/__init__.py` says why)."""
    gc.freeze()
    gc.enable()


def progress(items: Sequence[Item], what: str, unit: str, per_item: int = 1) -> Iterator[Item]:
    """The items, with a bar on a terminal and a line now and then elsewhere, both with a rate."""
    if sys.stderr.isatty():
        yield from _bar(items, what)
        return
    start = last = time.monotonic()
    whose = "".join(f"{words}: " for words in _whose)
    for done, item in enumerate(items, start=1):
        yield item
        if on_item is not None:
            on_item()
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS and done < len(items):
            last = now
            rate = done * per_item / (now - start)
            left = (len(items) - done) * per_item / rate
            log.info(
                "%s%s: %d of %d (%.0f %%), %.1f %s/s, %s left",
                whose, what, done, len(items), 100 * done / len(items), rate, unit, in_time(left),
            )  # fmt: skip


def in_time(seconds: float) -> str:
    """'45 s', '12 min' or '3.4 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def choose_device(threads: int, jobs_per_gpu: int = 1) -> torch.device:
    """A CUDA device that no other stage of this machine holds, else the CPU with that many threads.

    With jobs_per_gpu above 1, up to so many stages that ask for the same number share the device.
    """
    import torch

    torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        warn_of_unseen_devices()
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:  # whoever launched this process has chosen
        return torch.device("cuda")
    [index] = lease_visible(jobs_per_device=jobs_per_gpu)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def warn_of_unseen_devices() -> None:
    """Warn if this process was given GPUs and torch sees none: it will be slow, not wrong."""
    promised = promised_devices(os.environ)
    if promised:
        log.warning(
            "CUDA_VISIBLE_DEVICES is %s, but torch sees no GPU: working on the CPU; `python -m "
            "stages.doctor` looks at the installation", ",".join(promised),
        )  # fmt: skip


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f}/s")


def _bar(items: Iterable[Item], what: str) -> Iterator[Item]:
    columns = (
        TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        for item in bar.track(list(items)):
            yield item
            if on_item is not None:
                on_item()


def set_up_log() -> None:
    """Log to stderr; of several processes only the main one logs more than warnings."""
    logging.basicConfig(
        level=logging.INFO if _is_main() else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    warnings.filterwarnings("ignore", category=FutureWarning)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def peak_memory() -> str:
    """The most memory that this process has held, and on the GPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    text = f"{peak:.2f} GB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        text += f", GPU {torch.cuda.max_memory_allocated() / 1024**3:.2f} GB"
    return text


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
