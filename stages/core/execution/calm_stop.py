"""What Snakemake says on the terminal when a person presses Ctrl-C: one line, and no errors."""

from __future__ import annotations

import atexit
import logging
import sys

STOPPING = "Terminating processes on user request"
"""How Snakemake's own message begins."""
OURS = "Stopping: the stages keep what they have done ..."
"""What a terminal shows instead."""


class CalmStop(logging.Filter):
    """Of a terminal's handler: after Ctrl-C nothing is told of the jobs that were stopped.

    Snakemake reports each as an error, with its command. Its log file keeps all of that.
    """

    is_stopping = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown; Snakemake's word of the stop becomes ours."""
        if self.is_stopping:
            return False
        if str(record.msg).startswith(STOPPING):
            self.is_stopping = True
            record.msg, record.args = OURS, ()
            atexit.register(tell_stopped)
        return True


def tell_stopped() -> None:
    """The last line."""
    print("Stopped. The same command continues from here.", file=sys.stderr, flush=True)


def be_calm(logger: logging.Logger) -> None:
    """Have Snakemake's terminal handlers stop calmly; log files stay as they are."""
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(
            handler, logging.FileHandler
        ):
            handler.filters.insert(0, CalmStop())  # before the one that --quiet is
