"""A disk that is full or read-only is named, with the file and what to do; nothing half-written stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.core.artifacts.files import replacing, write_text
from stages.core.artifacts.schemas import PROMPTS
from stages.core.artifacts.tables import read_batches, write_table, writing_table
from stages.core.errors import UserError
from stages.core.execution.disk import DiskError, refuse_full, refuse_unwritable, writing
from stages.core.export.folders import export_folder
from tests.builders import prompt_row
from tests.small_disks import mounted

MEGABYTE = 2**20


def table(path: Path) -> None:
    rows = [prompt_row(os.urandom(MEGABYTE).hex())]
    write_table(path, rows, PROMPTS, stage="select_prompts", arguments={})


def state(path: Path) -> None:
    with replacing(path) as part, part.open("wb") as file:
        torch.save({"weights": torch.randn(MEGABYTE)}, file)


def weights(path: Path) -> None:
    with replacing(path) as part:
        save_file({"weights": torch.randn(MEGABYTE)}, part)


def text(path: Path) -> None:
    with replacing(path) as part:
        part.write_text("x" * 2 * MEGABYTE)


@pytest.mark.parametrize("write", [table, state, weights, text])
def test_a_full_disk_is_named_and_what_was_there_stays(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    with mounted(tmp_path, size="1m"):
        path = tmp_path / "artifact"
        path.write_text("what was there")
        with pytest.raises(DiskError) as caught:
            write(path)
        assert f"{path} could not be written: the disk is full; free some space (" in str(
            caught.value
        )
        assert "run the same command again" in str(caught.value)
        assert path.read_text() == "what was there"
        assert list(tmp_path.iterdir()) == [path]


def test_no_room_for_anything_is_refused_at_the_start(tmp_path: Path) -> None:
    with mounted(tmp_path, size="1m"):
        refuse_full(tmp_path)
        (tmp_path / "large").write_bytes(bytes(MEGABYTE - 4096))
        with pytest.raises(DiskError, match="is full: 4 kB are free. Free some space, then run"):
            refuse_full(tmp_path)


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path, options="ro"):
        with pytest.raises(DiskError, match="results cannot be written to: .* mounted read-only"):
            refuse_unwritable([tmp_path / "results"])
        with pytest.raises(DiskError, match="results/table could not be written: .* read-only"):
            text(tmp_path / "results" / "table")
    refuse_unwritable([tmp_path / "results" / "not" / "made" / "yet"])


def test_a_quota_and_missing_rights_are_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="quota is used up"), writing(tmp_path / "table"):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    with pytest.raises(DiskError, match="this user may not write there"), writing(tmp_path):
        raise RuntimeError("some library failed") from PermissionError(errno.EACCES, "no")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^a mistake$"), writing(tmp_path / "table"):
        raise RuntimeError("a mistake")


def no_rights(path: Path) -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize("name", ["elsewhere/input.parquet", "results/input.parquet"])
def test_an_input_that_cannot_be_read_is_not_taken_for_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, output = tmp_path / name, tmp_path / "results" / "table.parquet"
    made_by = {"stage": "select_prompts", "arguments": {}}
    with pytest.raises(PermissionError, match=name), writing_table(output, PROMPTS, **made_by):
        raise no_rights(path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # as pyarrow, without name

    path.parent.mkdir(exist_ok=True)
    path.touch()
    with (
        pytest.raises(UserError, match=f"{name} is no readable Parquet file"),
        writing_table(output, PROMPTS, **made_by) as writer,
    ):
        monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
        writer.write(next(read_batches(path, PROMPTS, size=1)))
    assert not output.exists()


@pytest.mark.parametrize("name", [None, "/cache/models/vae.safetensors"])
def test_a_full_disk_elsewhere_keeps_the_message_that_tells_it(
    tmp_path: Path, name: str | None
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    with (
        pytest.raises(UserError, match=r"^the VAE cannot be loaded: .*No space left") as caught,
        writing(tmp_path / "table"),
    ):
        raise UserError(f"the VAE cannot be loaded: {full}") from full
    assert not isinstance(caught.value, DiskError)


def test_words_count_only_where_a_library_keeps_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Permission denied"), writing(tmp_path / "table"):
        raise RuntimeError("the hub says: Permission denied")


@pytest.mark.parametrize(
    "name", ["results/table", "results/.table.7.part/model/weights", "results", "."]
)
def test_a_name_of_our_own_is_one_that_could_not_be_written(tmp_path: Path, name: str) -> None:
    table = tmp_path / "results" / "table"
    with pytest.raises(DiskError, match="results/table could not be written"), writing(table):
        raise no_rights(tmp_path / name)


def test_a_folder_is_named_and_not_the_half_written_file_in_it(tmp_path: Path) -> None:
    with mounted(tmp_path, size="1m"):
        with (
            pytest.raises(DiskError, match=f"^{tmp_path}/export could not be written: .* full"),
            export_folder(tmp_path / "export") as folder,
        ):
            write_text(folder / "README.md", "x" * 2 * MEGABYTE)
        assert not list(tmp_path.iterdir())
