"""What is in a column of a table: how many values, their range and quantiles, and what is odd about them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.artifacts.images import ImageError, image_size

FEW = 8
"""So many different texts are told with their counts; of more, some examples."""
EXAMPLES = 3
SEED = "seed"
"""The unit of numbers whose range means nothing."""
LONGEST = 60
"""Letters of a text that are shown."""


@dataclass(kw_only=True)
class Column:
    """What a column holds; filled part by part, so that no table of images is in memory."""

    name: str
    type: str
    meaning: str
    unit: str
    is_nullable: bool
    num_rows: int = 0
    num_nulls: int = 0
    num_not_finite: int = 0
    warnings: list[str] = field(default_factory=list)
    _numbers: list[np.ndarray] = field(default_factory=list, repr=False)
    _texts: Counter[str] = field(default_factory=Counter, repr=False)
    _images: Counter[str] = field(default_factory=Counter, repr=False)
    _digests: list[bytes | None] = field(default_factory=list, repr=False)
    _bytes: list[int] = field(default_factory=list, repr=False)
    _lengths: list[int] = field(default_factory=list, repr=False)
    _low: float = field(default=np.inf, repr=False)
    _high: float = field(default=-np.inf, repr=False)

    def add(self, part: pa.ChunkedArray) -> None:
        """Take the next rows of the column."""
        if pa.types.is_dictionary(part.type):
            part = part.cast(part.type.value_type)
        first = self.num_rows
        self.num_rows += len(part)
        self.num_nulls += part.null_count
        kind = part.type
        if is_image(kind):
            self._add_images(part, first)
        elif _is_number(kind):
            self._numbers.append(self._finite(pc.drop_null(part)))
        elif _is_text(kind) or pa.types.is_boolean(kind):
            self._texts.update(map(str, pc.drop_null(part).to_pylist()))
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            self._add_lists(part)

    def _add_images(self, part: pa.ChunkedArray, first: int) -> None:
        for row, value in enumerate(part.to_pylist(), start=first):
            data = (value or {}).get("bytes")
            if data is None:
                self._digests.append(None)
                continue
            self._bytes.append(len(data))
            self._digests.append(hashlib.sha256(data).digest())
            try:
                width, height = image_size(data)
            except ImageError as error:
                self.warnings.append(f"row {row}: no readable image ({error})")
            else:
                self._images[f"{width} x {height} {_kind_of(data)}"] += 1

    def _add_lists(self, part: pa.ChunkedArray) -> None:
        whole = pc.drop_null(part)
        self._lengths += pc.list_value_length(whole).to_pylist()
        if not _is_number(part.type.value_type):
            return
        inside = self._finite(pc.drop_null(pc.list_flatten(whole)))
        if len(inside):
            self._low = min(self._low, float(inside.min()))
            self._high = max(self._high, float(inside.max()))

    def _finite(self, values: pa.ChunkedArray) -> np.ndarray:
        """The values as they are, without those that are nan or infinite, which are counted."""
        numbers = values.to_numpy()
        is_finite = np.isfinite(numbers)
        self.num_not_finite += int((~is_finite).sum())
        return np.asarray(numbers[is_finite])

    @property
    def image_digests(self) -> list[bytes | None]:
        """Of each row's image; empty where the column holds none."""
        return self._digests

    def summary(self) -> str:
        """The column's values in one line."""
        if self.num_rows == self.num_nulls:
            return "no value" if self.num_rows else "no row"
        if self._digests and not self._bytes:
            return "no image"
        if self._digests:
            sizes = ", ".join(f"{count} of {kind}" for kind, count in self._images.most_common(4))
            low, middle, high = np.quantile(self._bytes, [0, 0.5, 1])
            return f"{sizes}; {_bytes(low)} to {_bytes(high)}, median {_bytes(middle)}"
        if self._numbers:
            values = np.concatenate(self._numbers)
            if self.unit == SEED:
                return f"{len(np.unique(values))} different"
            return _counted(values) or _range(values)
        if self._lengths:
            return self._list_summary()
        if self._texts:
            return self._text_summary()
        return f"{self.num_rows - self.num_nulls} values of a kind that is not summed up"

    def _list_summary(self) -> str:
        low, high = min(self._lengths), max(self._lengths)
        text = f"{low} values each" if low == high else f"{low} to {high} values each"
        if np.isfinite(self._low):
            text += f", from {number(self._low)} to {number(self._high)}"
        return text

    def _text_summary(self) -> str:
        different = len(self._texts)
        if different <= FEW and different < self.num_rows - self.num_nulls:
            return ", ".join(
                f"{_short(text)} ({count})" for text, count in self._texts.most_common()
            )
        some = ", ".join(_short(text) for text in list(self._texts)[:EXAMPLES])
        letters = sorted(map(len, self._texts))
        more = " ..." if different > EXAMPLES else ""
        return f"{different} different, {letters[0]} to {letters[-1]} letters: {some}{more}"

    def found(self) -> Iterator[str]:
        """What is odd about the column, a sentence each."""
        if self.num_nulls and not self.is_nullable:
            yield f"{self.name}: {self.num_nulls} of {self.num_rows} values are null, and none may be"
        if self.num_not_finite:
            yield f"{self.name}: {self.num_not_finite} values are nan or infinite"
        shown = self.warnings[:EXAMPLES]
        yield from (f"{self.name}, {warning}" for warning in shown)
        if len(self.warnings) > len(shown):
            yield f"{self.name}: {len(self.warnings) - len(shown)} more of the kind"
        num_empty = self._digests.count(None) - self.num_nulls
        if self._digests and num_empty:
            yield f"{self.name}: {num_empty} images have no bytes"
        repeats = Counter(digest for digest in self._digests if digest)
        twice = sum(count - 1 for count in repeats.values())
        if twice:
            yield f"{self.name}: {twice} images are byte for byte the same as another row's"


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this type holds images, as Hugging Face `datasets` stores them."""
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def is_numeric(kind: pa.DataType) -> bool:
    """Whether a column holds numbers, or lists of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return is_numeric(kind.value_type)
    return _is_number(kind)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _kind_of(data: bytes) -> str:
    heads = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"RIFF": "WEBP"}
    return next((kind for head, kind in heads.items() if data.startswith(head)), "image")


def _counted(values: np.ndarray) -> str:
    """Whole numbers with their counts, where few are different and some come again; else nothing."""
    different, counts = np.unique(values, return_counts=True)
    if (
        values.dtype.kind not in "iu"
        or not 1 < len(different) <= FEW
        or len(different) == len(values)
    ):
        return ""
    return ", ".join(f"{value} ({count})" for value, count in zip(different, counts, strict=True))


def _range(values: np.ndarray) -> str:
    if not len(values):
        return "no finite value"
    if values.min() == values.max():
        return f"always {number(values[0])}"
    low, some, middle, most, high = map(number, np.quantile(values, [0, 0.05, 0.5, 0.95, 1]))
    return (
        f"{low} to {high}; 5 % {some}, median {middle}, 95 % {most}; mean {number(values.mean())}, "
        f"{len(np.unique(values))} different"
    )


def number(value: Any) -> str:
    """Up to four figures, without a dot where it is whole and not huge."""
    value = float(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _short(text: str) -> str:
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return repr(line if len(line) <= LONGEST else line[: LONGEST - 3] + "...")


def _bytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"
