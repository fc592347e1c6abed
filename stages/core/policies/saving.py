"""Weights on disk, complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from stages.core.artifacts.files import give_usual_modes
from stages.core.execution.disk import writing
from stages.core.models.denoiser import Denoiser


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def save_policy(policy: Denoiser, output: Path, part: str) -> None:
    """The policy in diffusers' layout, replacing what was there at once; see `replace_weights`."""
    replace_weights(output, lambda folder: policy.save(folder, part))


def replace_weights(output: Path, save: Callable[[Path], None]) -> None:
    """What `save` writes into a folder, replacing what was in `output` at once.

    DiskError if the disk is full or read-only; no weights of the new ones stay then.
    """
    new = output / "new.part"
    shutil.rmtree(new, ignore_errors=True)
    with writing(output):
        try:
            save(new)
            give_usual_modes(new)
            for file in (path for path in new.rglob("*") if path.is_file()):
                with file.open("rb") as written:
                    os.fsync(written.fileno())  # before the manifest says that all is there
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    (output / "manifest.json").unlink(missing_ok=True)
    for old in [path for path in output.iterdir() if path != new]:
        _remove(old)  # also weights of the other kind
    for path in sorted(new.iterdir()):
        path.replace(output / path.name)
    new.rmdir()
