"""Disks for tests: small ones that fill up, and ones that cannot be written to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, *, size: str = "100%", options: str = "rw") -> Iterator[None]:
    """A disk of its own at an empty folder, in memory. Skips the test without the right to mount."""
    if sys.platform != "linux":
        pytest.skip("needs Linux's tmpfs")
    command = ["mount", "-t", "tmpfs", "-o", f"{options},size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size: str) -> None:
    """Give the disk at `folder` another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
