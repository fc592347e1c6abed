"""SAIL as a chain of standalone stages over a small library (`stages.core`)."""

import gc
import sys

# Python's name for a program that it still looks for, as in `python -m stages.train_seed`. What a stage
# imports stays until it ends, so looking through it for garbage is in vain, and takes a third of the
# time; `stages.core.execution.runtime.collect_garbage` goes on with it. Another program that imports
# stages has a name by then, and is left alone.
if sys.argv[:1] == ["-m"]:
    gc.disable()

    def _without_traceback(kind, value, at):  # type: ignore[no-untyped-def]
        """Ctrl-C while a stage still imports is no error of its own."""
        if issubclass(kind, KeyboardInterrupt):
            print("stopped before it began", file=sys.stderr)
        else:
            sys.__excepthook__(kind, value, at)

    sys.excepthook = _without_traceback
