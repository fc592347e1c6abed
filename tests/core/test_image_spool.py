"""The spool of images says which disk is full or read-only, and leaves nothing behind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.core.data.image_spool import ImageSpool
from stages.core.data.layouts.labels import Cell, FoundImage
from stages.core.execution.disk import DiskError
from tests.small_disks import mounted


def noise(side: int) -> bytes:
    """A PNG file that hardly compresses."""
    pixels = np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("free", [2**19, 2**12])
def test_a_disk_that_fills_is_named(tmp_path: Path, free: int) -> None:
    small, large = noise(16), noise(1024 if free > 2**12 else 48)
    with mounted(tmp_path, size="1m"):
        (tmp_path / "other").write_bytes(bytes(2**20 - free))
        with (
            pytest.raises(DiskError, match=f"^{tmp_path}/seed/images.spool .* the disk is full"),
            ImageSpool(tmp_path / "seed") as spool,
        ):
            first = FoundImage(tmp_path, Cell(0, "chosen"), small)
            spool.store(first)
            assert spool.read((first.file, first.cell)) == small
            spool.store(FoundImage(tmp_path, Cell(1, "chosen"), large))
        assert not list((tmp_path / "seed").iterdir())


@pytest.mark.parametrize("name", ["", "not/made/yet"])
def test_a_read_only_disk_is_named(tmp_path: Path, name: str) -> None:
    with (
        mounted(tmp_path, options="ro"),
        pytest.raises(DiskError, match="images.spool could not be written: .* read-only"),
    ):
        ImageSpool(tmp_path / name)
