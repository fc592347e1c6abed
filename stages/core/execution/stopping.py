"""How a stage ends before its work is done: on SIGTERM, or because its Snakemake is gone."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

EXIT_CODE = 128 + signal.SIGTERM
"""Of a stage that SIGTERM ended: 143, as shells count."""

SNAKEMAKE = "SAIL_SNAKEMAKE"
"""Environment variable with the process id of the Snakemake that started a stage."""


SHELL = "SAIL_SHELL"
"""Environment variable with the process id of a stage's shell, where that is not its parent."""


class Stopped(BaseException):
    """Raised in the main thread on SIGTERM; the message says what was saved."""


class Stop:
    """Whether SIGTERM has come: for work that decides itself where to end."""

    def __init__(self) -> None:
        self.is_asked = False
        self.is_deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block SIGTERM only sets `is_asked`."""
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False

    def ask(self, *_: object) -> None:
        """Handle SIGTERM: end here, or, where it is deferred, let that block decide when."""
        self.is_asked = True
        if not self.is_deferred:
            raise Stopped("nothing half-written was left")


STOP = Stop()
"""Of this process."""


def heed_signals() -> None:
    """End on SIGTERM, and when the Snakemake that started this process has ended, however it did.

    Otherwise a stage whose Snakemake was killed would work on beside its own replacement.
    """
    signal.signal(signal.SIGTERM, STOP.ask)
    end_with_snakemake()


def end_with_snakemake() -> None:
    """Send SIGTERM to this process when the Snakemake that started it has ended, if one did.

    The same when the shell between the two has ended: Snakemake then thinks that the stage has.
    """
    snakemake = os.environ.get(SNAKEMAKE, "")
    if not snakemake.isdecimal():
        return
    shell = os.environ.pop(SHELL, "")  # a stage's own children have other parents
    for process in (int(snakemake), int(shell) if shell.isdecimal() else os.getppid()):
        if process > 1:
            threading.Thread(target=_end_with, args=(process,), daemon=True).start()


def _end_with(process: int) -> None:
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        _await_end(process)
    os.kill(os.getpid(), signal.SIGTERM)


def _await_end(process: int) -> None:
    """Wait for the end of a process. ProcessLookupError or psutil.NoSuchProcess if there is none."""
    try:
        handle = os.pidfd_open(process) if sys.platform == "linux" else None
    except ProcessLookupError:
        raise
    except OSError:  # a kernel before 5.3
        handle = None
    if handle is None:
        psutil.Process(process).wait()
    else:
        end = select.poll()
        end.register(handle, select.POLLIN)
        end.poll()  # at its death, where psutil would wait for its parent to ask about it
