"""Run pytest in a fork of a Python that has imported the libraries, and nothing of this project."""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from pathlib import Path

LIBRARIES = ("diffusers", "hypothesis", "jaxtyping", "peft", "pyarrow.parquet", "pytest",
             "scipy.stats", "torch", "transformers", "tyro")  # fmt: skip
if __name__ != "__main__" and "SAIL_MUTANTS_WARM" in os.environ:
    from importlib import import_module

    for library in LIBRARIES:
        import_module(library)
    for name in ("UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler", "DDPMScheduler"):
        getattr(sys.modules["diffusers"], name)
    for name in ("CLIPTextModel", "CLIPTokenizer", "CLIPTextModelWithProjection"):
        getattr(sys.modules["transformers"], name)


def run_pytest(tree: Path, words: list[str], output: Path) -> int:
    """Its exit status in a tree; what it prints goes to a file."""
    os.environ["SAIL_MUTANTS_WARM"] = "1"
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_in_fork, args=(str(tree), words, str(output)))
    process.start()
    process.join()
    return process.exitcode if process.exitcode is not None else 1


def _in_fork(tree: str, words: list[str], output: str) -> None:
    import pytest

    with Path(output).open("w", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.chdir(tree)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("stages", "tests", "benchmarks", "__mp_main__"):
            del sys.modules[name]
    sys.path[:] = [tree, *(path for path in sys.path if path not in ("", os.environ.get("PWD")))]
    os.environ |= {"PYTHONPATH": tree, "PWD": tree}
    os._exit(int(pytest.main(words)))
