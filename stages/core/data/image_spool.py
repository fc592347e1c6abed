"""Images of chosen labels on their way from many files into one table: on disk, each once, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from stages.core.artifacts.images import ImageError, preview_image
from stages.core.artifacts.spools import SpoolFile
from stages.core.data.layouts.labels import FoundImage, Place
from stages.core.data.near_duplicates import difference_hash
from stages.core.execution.disk import writing

MIN_SIDE = 16
"""Pixels; a smaller image shows nothing that could be preferred."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An image in the spool."""

    offset: int
    length: int
    width: int
    height: int
    look: int
    """Difference hash."""


class ImageSpool(SpoolFile):
    """The images, each once; DiskError, which names images.spool, if the disk does not take them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "images.spool")
        self._images: dict[bytes, Stored] = {}
        self._digests: dict[Place, bytes] = {}
        self._uids: dict[str, tuple[bytes, FoundImage]] = {}

    def __enter__(self) -> ImageSpool:
        return self

    def __contains__(self, place: Place) -> bool:
        return place in self._digests

    def store(self, found: FoundImage) -> None:
        """Keep an image. ImageError if it has no bytes, is broken, or differs from one of the same uid."""
        if found.problem is not None or not found.data:
            raise ImageError(found.problem or "the image has no bytes")
        digest = blake2b(found.data, digest_size=16).digest()
        if digest not in self._images:
            self._images[digest] = self._append(found.data)
        if found.uid is not None:
            known, first = self._uids.setdefault(found.uid, (digest, _without_data(found)))
            if known != digest:
                raise ImageError(
                    f"the image {found.uid!r} has other bytes than the one of the same uid in "
                    f"{first.file}, row {first.cell.row}, column {first.cell.column!r}"
                )
        self._digests[found.file, found.cell] = digest

    def digest(self, place: Place) -> bytes:
        """What names the bytes of the image at a place."""
        return self._digests[place]

    def stored(self, place: Place) -> Stored:
        """What is known of the image at a place."""
        return self._images[self._digests[place]]

    def read(self, place: Place) -> bytes:
        """The bytes of the image at a place."""
        image = self.stored(place)
        return os.pread(self._file.fileno(), image.length, image.offset)

    def _append(self, data: bytes) -> Stored:
        found = preview_image(data)
        if min(found.width, found.height) < MIN_SIDE:
            raise ImageError(
                f"the image is {found.width} x {found.height} pixels; expected at least "
                f"{MIN_SIDE} x {MIN_SIDE}"
            )
        offset = self._file.tell()
        with writing(self._path):
            self._file.write(data)
            self._file.flush()
        return Stored(offset, len(data), found.width, found.height, difference_hash(found.image))


def _without_data(found: FoundImage) -> FoundImage:
    return FoundImage(found.file, found.cell, None)
