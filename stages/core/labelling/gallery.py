"""The images to be labelled: their bytes when they are asked for, the last ones kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from threading import Lock

import numpy as np

from stages.core.artifacts.images import ImageError, decode_image, encode_png, image_kind
from stages.core.data.image_spool import MIN_SIDE
from stages.core.data.layouts.sources import Folder, read_cell, read_rows
from stages.core.labelling.places import Place, PromptImages

SHOWN = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "avif": "image/avif"}
"""Kinds that every browser shows as `decode_image` does; the others are sent as PNG."""
NUM_KEPT = 64
"""Images that stay in memory after they were read."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as it is shown."""

    digest: str
    """Names the bytes of its file."""
    data: bytes
    """What the browser is sent: those bytes, or a PNG of what they show."""
    media_type: str
    width: int
    height: int


class Gallery:
    """Reads images one by one, and keeps the last ones; of several threads one at a time."""

    def __init__(self, prompts: Sequence[PromptImages]) -> None:
        self.prompts = list(prompts)
        self.places = {place.name: place for prompt in prompts for place in prompt.places}
        self._kept: OrderedDict[Place, Picture] = OrderedDict()
        self._where: dict[str, Place] = {}
        self._turn = Lock()

    def picture(self, place: Place) -> Picture:
        """The image at a place. ImageError, which names it, if it cannot be read or is too small."""
        with self._turn:
            if place not in self._kept:
                self._kept[place] = _picture(place)
                self._where[self._kept[place].digest] = place
                if len(self._kept) > NUM_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(place)
            return self._kept[place]

    def find(self, digest: str) -> Picture | None:
        """The image of these bytes, if it was read before."""
        place = self._where.get(digest)
        return None if place is None else self.picture(place)

    def read(self, places: Collection[Place]) -> Iterator[tuple[Place, bytes | None]]:
        """The bytes of some images, file after file; None for one that is no longer there."""
        tables: dict[tuple[Path, str], dict[int, Place]] = {}
        for place in sorted(places, key=lambda place: place.name):
            if place.row is None:
                yield place, place.file.read_bytes() if place.file.is_file() else None
            else:
                tables.setdefault((place.file, place.column), {})[place.row] = place
        for (file, column), rows in tables.items():
            left = dict(rows)
            for row, values in read_rows(file, [column], with_images=True, only=rows):
                data, _problem = read_cell(values.get(column), Folder(file.parent))
                yield left.pop(int(row)), data
            yield from ((place, None) for place in left.values())

    def digests(self, names: Collection[str]) -> Mapping[str, str]:
        """What names the bytes of the images of some names, of those that are there."""
        wanted = {self.places[name] for name in names if name in self.places}
        return {place.name: digest_of_image(data) for place, data in self.read(wanted) if data}


def digest_of_image(data: bytes) -> str:
    """What names an image's bytes, 32 hex digits."""
    return blake2b(data, digest_size=16).hexdigest()


def _picture(place: Place) -> Picture:
    data = _bytes_of(place)
    image = decode_image(data, str(place))
    if min(image.size) < MIN_SIDE:
        raise ImageError(
            f"{place}: the image is {image.width} x {image.height} pixels; expected at least "
            f"{MIN_SIDE} x {MIN_SIDE}"
        )
    kind = image_kind(data, str(place))
    shown = data if kind in SHOWN else encode_png(np.asarray(image))
    media_type = SHOWN.get(kind, "image/png")
    return Picture(digest_of_image(data), shown, media_type, image.width, image.height)


def _bytes_of(place: Place) -> bytes:
    try:
        if place.row is None:
            return place.file.read_bytes()
        rows = read_rows(place.file, [place.column], with_images=True, only={place.row})
        values = next((values for _, values in rows), {})
    except OSError as error:
        raise ImageError(f"{place}: the image cannot be read: {error.strerror}") from error
    data, problem = read_cell(values.get(place.column), Folder(place.file.parent))
    if data is None:
        raise ImageError(f"{place}: {problem}")
    return data
