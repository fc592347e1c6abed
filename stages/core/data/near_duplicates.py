"""Images that look alike: a 64-bit difference hash, and which hashes lie close together."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64
from PIL import Image

MAX_DISTANCE = 3
"""Hashes that differ in at most so many of their 64 bits are near-duplicates."""
BANDS = 4
"""More than `MAX_DISTANCE`: near hashes agree in at least one of these 16-bit parts."""
ROWS_AT_ONCE = 512


def difference_hash(image: Image.Image) -> int:
    """64 bits that say where the image, at 9 x 8, becomes brighter to the right (dHash)."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX, reducing_gap=2.0)
    grey = np.asarray(small).astype(np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def distance(
    first: UInt64[np.ndarray, "*shape"], second: UInt64[np.ndarray, "*shape"]
) -> UInt8[np.ndarray, "*shape"]:
    """How many bits of the hashes differ."""
    return np.bitwise_count(first ^ second)


def has_near(
    hashes: UInt64[np.ndarray, " image"], groups: Int[np.ndarray, " image"]
) -> Bool[np.ndarray, " image"]:
    """Which images have a near-duplicate in another group; all pairs are found.

    Two hashes at a distance of 3 agree in one of four parts, so only those are compared.
    """
    found = np.zeros(len(hashes), bool)
    for band in range(BANDS):
        part = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.diff(part[order])) + 1
        for run in np.split(order, starts):
            if len(run) < 2:
                continue
            for start in range(0, len(run), ROWS_AT_ONCE):
                some = run[start : start + ROWS_AT_ONCE]
                near = np.bitwise_count(hashes[some, None] ^ hashes[None, run]) <= MAX_DISTANCE
                found[some] |= (near & (groups[some, None] != groups[None, run])).any(axis=1)
    return found
