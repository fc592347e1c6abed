"""Tensors that are written by rows and mapped: what they hold, how they are checked, what a full disk says."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.tensor_files import (
    has_tensors,
    is_undamaged,
    map_tensors,
    writing_tensors,
)
from stages.core.execution.disk import DiskError
from stages.core.method.noising import generator
from tests.small_disks import mounted

ROWS = 10


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Of several types, as a family's conditioning may have; one has no axis but its rows."""
    random = torch.randn((ROWS, 3, 5), generator=generator(1))
    return {
        "flags": torch.arange(ROWS) % 2 == 0,
        "text": random.bfloat16(),
        "half": random.half()[:, 0],
        "latents": random,
        "video": random.reshape(ROWS, 1, 3, 5, 1),
        "sizes": torch.arange(6 * ROWS).reshape(ROWS, 6),
    }


def write(path: Path, tensors: dict[str, Tensor], size: int = 4) -> Path:
    with writing_tensors(path, ROWS, "key") as file:
        for start in range(0, ROWS, size):
            file.write({name: tensor[start : start + size] for name, tensor in tensors.items()})
    return path


def test_what_was_written_by_rows_is_mapped_and_any_safetensors_reader_reads_it(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", tensors)
    mapped, read = map_tensors(path), load_file(path)
    assert mapped.tensors.keys() == read.keys() == tensors.keys()
    rows = torch.tensor([7, 0, 7, 9])
    for name, tensor in tensors.items():
        assert torch.equal(mapped.tensors[name], tensor), name
        assert torch.equal(read[name], tensor), name
        assert mapped.tensors[name].dtype == tensor.dtype
        assert torch.equal(mapped.tensors[name][rows], tensor[rows])
    mapped.let_go()
    assert torch.equal(mapped.tensors["text"], tensors["text"])  # read again
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_do_not_depend_on_how_many_rows_came_at_once(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    one, all_at_once = (write(tmp_path / f"{size}", tensors, size) for size in (1, ROWS))
    assert one.read_bytes() == all_at_once.read_bytes()


def test_a_file_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    """Its rows take no room on the disk, for none was written: what safetensors' own reader cannot map."""
    rows = 200 * 10**6
    header = {"a": {"dtype": "F32", "shape": [rows, 500], "data_offsets": [0, 2000 * rows]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2000 * rows)
    tensor = map_tensors(path).tensors["a"]
    assert tensor.shape == (rows, 500)
    assert tensor[torch.tensor([3, rows - 1])].sum() == 0


def test_a_key_names_what_a_file_holds(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", tensors)
    assert has_tensors(path, "key")
    assert not has_tensors(path, "another")
    assert not has_tensors(tmp_path / "none", "key")


@pytest.mark.parametrize("name", ["flags", "text", "latents"])
def test_a_flipped_bit_is_found(tensors: dict[str, Tensor], tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.safetensors", tensors)
    assert is_undamaged(path)
    text = path.read_bytes()
    size = struct.unpack("<Q", text[:8])[0]
    begin, end = json.loads(text[8 : 8 + size])[name]["data_offsets"]
    place = 8 + size + (begin + end) // 2
    path.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
    assert has_tensors(path, "key")
    assert not is_undamaged(path)


def test_a_file_cut_short_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", tensors)
    mapped = map_tensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert not has_tensors(path, "key")
    assert not is_undamaged(path)
    with pytest.raises(ArtifactError, match=f"{re.escape(str(path))} is no readable safetensors"):
        map_tensors(path)
    with pytest.raises(ArtifactError, match="it was cut short while a training read it"):
        mapped.let_go()


def test_a_file_that_lacks_rows_is_not_left(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="has not got its 10 rows"),
        writing_tensors(tmp_path / "a", ROWS, "key") as file,
    ):
        file.write({name: tensor[:3] for name, tensor in tensors.items()})
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_named_before_the_rows_are_made(tmp_path: Path) -> None:
    with mounted(tmp_path, size="1m"):
        path = tmp_path / "a.safetensors"
        with (
            pytest.raises(DiskError, match="a.safetensors could not be written: the disk is full"),
            writing_tensors(path, 1000, "key") as file,
        ):
            file.write({"a": torch.zeros(1, 1000)})  # the first of 4 MB
        assert not list(tmp_path.iterdir())


MEASURE = """
import sys, torch
from pathlib import Path
from stages.core.artifacts.tensor_files import map_tensors

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

file = map_tensors(Path(sys.argv[1]))
rows, before = file.tensors["a"], kilobytes("VmRSS")
for start in range(0, len(rows), 8):
    assert rows[torch.arange(start, start + 8)].sum() == 8 * 2**18
    file.let_go()
print(kilobytes("VmRSS") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_that_were_let_go_take_no_memory(tmp_path: Path) -> None:
    """All of a file of 128 MB is read; in memory are never more than some rows of 1 MB.

    And what the kernel maps around them: 45 MB were seen once, on a machine with much memory free.
    """
    path = tmp_path / "a"
    with writing_tensors(path, 128, "key") as file:
        for _ in range(128):
            file.write({"a": torch.ones(1, 2**18)})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64_000
