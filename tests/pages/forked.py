"""Servers of pages as forks of one process that has imported them: killed a hundred times, each starts at once.

`python -m stages.label` imports for seconds before it serves. What is killed here is the server's own process, too.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import tyro

from stages.core.execution.runtime import run_stage

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "stages.audit", "stages.label"])


@contextmanager
def forked(stage: str, log: Path, *flags: str) -> Iterator[tuple[BaseProcess, str]]:
    """A stage that serves a page on a free port, and the first line that it prints; killed at the end.

    What it says goes to the end of a log. AssertionError with that if it ends without a line or with a traceback.
    """
    reader, writer = FORKS.Pipe(duplex=False)
    process = FORKS.Process(
        target=become, args=(stage, [*flags, "--port", "0", "--no-open-browser"], writer, log)
    )
    with reader, open(reader.fileno(), closefd=False) as printed:
        process.start()
        writer.close()
        try:
            line = printed.readline()
            assert line, log.read_text()
            yield process, line
        finally:
            process.kill()
            process.join()
    assert "Traceback" not in log.read_text(), log.read_text()


def become(stage: str, words: list[str], writer: Connection, log: Path) -> None:
    """Be that stage, with stdout at the other process and stderr in a log."""
    with log.open("a") as errors:
        os.dup2(errors.fileno(), 2)
    os.dup2(writer.fileno(), 1)
    module = import_module(stage)
    run_stage(module.main, tyro.cli(module.Args, args=words))
