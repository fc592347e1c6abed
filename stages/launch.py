r"""Start a training stage in several processes, each with a GPU of its own that no other job holds.

They find each other at a port that is free. Without a GPU they share the CPU. Example:
    python -m stages.launch 4 stages.train_seed --preferences preferences.parquet ...
"""

from __future__ import annotations

import os
import sys

from stages.core.errors import UserError
from stages.core.execution.devices import lease_visible, visible_words
from stages.core.execution.runtime import collect_garbage, set_up_log, warn_of_unseen_devices
from stages.core.execution.stopping import end_with_snakemake


def main(arguments: list[str]) -> None:
    """Lease the devices, then do as `torchrun` does, and keep them until the last process ends.

    On SIGTERM the processes have 30 seconds to save and end; the exit code is 143 then. UserError
    unless the arguments are a number, a stage's module and its flags, and for more processes than
    there are GPUs.
    """
    if len(arguments) < 2 or not arguments[0].isdecimal() or int(arguments[0]) < 1:
        raise UserError(
            f"expected the number of processes and a stage, found {' '.join(arguments[:2])!r}\n\n"
            f"{__doc__}"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.run import main as torchrun

    processes = int(arguments[0])
    os.environ |= visible_devices(processes)
    end_with_snakemake()
    try:
        torchrun(["--standalone", f"--nproc-per-node={processes}", "-m", *arguments[1:]])
    except SignalException as caught:
        print(f"the processes have ended after {caught.sigval.name}", file=sys.stderr)
        raise SystemExit(128 + caught.sigval) from None


def visible_devices(processes: int) -> dict[str, str]:
    """The environment that shows the processes their leased GPUs; nothing without a GPU."""
    import torch

    there = torch.cuda.device_count()
    if there == 0:
        warn_of_unseen_devices()
        return {}
    if processes > there:
        raise UserError(
            f"{processes} processes need a GPU each, {there} are visible; lower "
            "execution.training_gpus, or show more in CUDA_VISIBLE_DEVICES"
        )
    words = visible_words(there, os.environ)
    return {"CUDA_VISIBLE_DEVICES": ",".join(words[place] for place in lease_visible(processes))}


if __name__ == "__main__":
    collect_garbage()
    set_up_log()
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__)
        raise SystemExit(0)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
