"""SAIL as a chain of standalone stages over a small library (`stages.core`)."""

import gc
import sys

# Python's name for a program that it still looks for, as in `python -m stages.train_seed`. What a stage
# imports stays until it ends, so looking through it for garbage is in vain, and takes a third of the
# time; `stages.core.execution.runtime.collect_garbage` goes on with it. Another program that imports
# stages has a name by then, and is left alone.
if sys.argv[:1] == ["-m"]:
    gc.disable()
