"""Tensors with one row an item, too large for memory: written some rows at a time, then mapped from the disk.

The files are safetensors, which any tool reads. Its own reader is not used for the mapping: torch maps a file as
private, which Linux refuses for files larger than its memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.core.artifacts.files import replacing
from stages.core.artifacts.provenance import ArtifactError

NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
"""What safetensors calls the types of torch that are kept."""
KINDS = {name: kind for kind, name in NAMES.items()}
NO_DIGEST = "0" * 64


class TensorWriter:
    """Takes the rows of a tensor file some at a time; what `writing_tensors` gives."""

    def __init__(self, file: BinaryIO, folder: Path, num_rows: int, key: str) -> None:
        self._file, self._folder, self._num_rows, self._key = file, folder, num_rows, key
        self._layout: dict[str, tuple[str, list[int], int]] = {}
        self._done: dict[str, int] = {}
        self._hashes: dict[str, hashlib._Hash] = {}

    def write(self, rows: Mapping[str, Tensor]) -> None:
        """Add rows of some of the tensors. The first call names all of them, by their types and shapes."""
        if not self._layout:
            self._lay_out(rows)
        for name, tensor in rows.items():
            kind, shape, start = self._layout[name]
            if (NAMES[tensor.dtype], list(tensor.shape[1:])) != (kind, shape[1:]):
                raise ValueError(f"{name} has rows of another type or shape than the first ones")
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            self._file.seek(start + self._done[name])
            self._file.write(data)
            self._hashes[name].update(data)
            self._done[name] += len(data)

    def close(self) -> None:
        """Write the digest of the rows. ValueError unless all of them were given."""
        for name, (kind, shape, _) in self._layout.items():
            if self._done[name] != _num_bytes(kind, shape):
                raise ValueError(f"{name} has not got its {self._num_rows} rows")
        self._file.seek(0)
        self._file.write(self._header(_joined(self._hashes)))

    def _lay_out(self, rows: Mapping[str, Tensor]) -> None:
        """Put the tensors of the widest types first, so that each begins at a multiple of its size."""
        for name, tensor in sorted(rows.items(), key=lambda pair: -pair[1].element_size()):
            shape = [self._num_rows, *tensor.shape[1:]]
            self._layout[name] = (NAMES[tensor.dtype], shape, 0)
            self._done[name], self._hashes[name] = 0, hashlib.sha256()
        start = len(self._header(NO_DIGEST))
        for name, (kind, shape, _) in self._layout.items():
            self._layout[name] = (kind, shape, start)
            start += _num_bytes(kind, shape)
        if shutil.disk_usage(self._folder).free < start:  # said before the work, not after it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _header(self, digest: str) -> bytes:
        header: dict[str, object] = {"__metadata__": {"key": self._key, "sha256": digest}}
        end = 0
        for name, (kind, shape, _) in self._layout.items():
            begin, end = end, end + _num_bytes(kind, shape)
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


@contextmanager
def writing_tensors(path: Path, num_rows: int, key: str) -> Iterator[TensorWriter]:
    """Write a tensor file, complete or not at all; `key` says what it holds, for `has_tensors`.

    DiskError if the disk has no room for it, at the first rows.
    """
    with replacing(path) as part, part.open("w+b") as file:
        writer = TensorWriter(file, path.parent, num_rows, key)
        yield writer
        writer.close()
        file.flush()


@dataclass(frozen=True)
class TensorFile:
    """The tensors of a file, mapped: a row is read from the disk when it is used.

    They cannot be written to. Processes that map the same file share what of it is in memory.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    pages: mmap.mmap

    def let_go(self) -> None:
        """Give back the memory of the rows read so far; they are read again when they are used again.

        ArtifactError if the file has been cut short since it was mapped, by which reading would end this process.
        """
        with suppress(OSError):  # removed: the mapping keeps its content
            size = self.path.stat().st_size
            if size < len(self.pages):
                raise ArtifactError(
                    f"{self.path} has {size} bytes, expected {len(self.pages)}: it was cut short while a training "
                    "read it. Run the same command again: it is made anew"
                )
        if hasattr(self.pages, "madvise"):
            self.pages.madvise(mmap.MADV_DONTNEED)


def map_tensors(path: Path) -> TensorFile:
    """The tensors of a file that `writing_tensors` wrote. ArtifactError if it is damaged."""
    header, start = _read_header(path)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, entry in header.items():
        kind = KINDS[entry["dtype"]]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(
                pages, dtype=kind,
                count=math.prod(entry["shape"]), offset=start + entry["data_offsets"][0],
            )  # fmt: skip
        tensors[name] = flat.reshape(entry["shape"])
    return TensorFile(path, tensors, pages)


def has_tensors(path: Path, key: str) -> bool:
    """Whether a whole file of this key stands at `path`; its rows are not read."""
    try:
        return _metadata(path).get("key") == key
    except ArtifactError:
        return False


def is_undamaged(path: Path) -> bool:
    """Whether the rows of a file are those that were written: reads them all."""
    try:
        header, start = _read_header(path)
        expected = _metadata(path).get("sha256")
    except ArtifactError:
        return False
    hashes = {}
    with path.open("rb") as file:
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            hashes[name] = hashlib.sha256()
            left = end - begin
            while left and (data := file.read(min(left, 2**20))):
                hashes[name].update(data)
                left -= len(data)
    return _joined(hashes) == expected


def _joined(hashes: Mapping[str, hashlib._Hash]) -> str:
    text = json.dumps({name: digest.hexdigest() for name, digest in hashes.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _num_bytes(kind: str, shape: list[int]) -> int:
    return math.prod(shape) * KINDS[kind].itemsize


def _metadata(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        return dict(file.metadata() or {})  # type: ignore[no-untyped-call]


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """What the header says of each tensor, and where their rows begin."""
    with _opened(path):  # safetensors checks that names, shapes, offsets and the file's size agree
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        file = safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is no readable safetensors file: {error}. Delete it; the training that wrote it makes it anew"
        ) from error
    with file:
        yield file
