"""Tables larger than memory: read and written some rows at a time, with the result of the plain way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.artifacts import tables
from stages.core.artifacts.joins import joined_batches
from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.schemas import CANDIDATES, PAIR_LATENTS, PREFERENCES, PROMPTS
from stages.core.artifacts.tables import (
    num_rows,
    read_batches,
    read_metadata,
    read_table,
    write_table,
    writing_table,
)
from stages.core.errors import UserError
from tests.builders import image_value, prompt_row

ROWS = [prompt_row(f"prompt number {number}") for number in range(1000)]
MADE = {"stage": "select_prompts", "arguments": {"take": 2}}


def pair_row(number: int) -> dict[str, object]:
    return {
        "pair_id": f"pair-{number}",
        **prompt_row(f"prompt {number}"),
        "winner": image_value(b"w%d" % number),
        "loser": image_value(b"l%d" % number),
        "source": "human",
        "iteration": 0,
    }


def latents_row(number: int) -> dict[str, object]:
    sizes = [1, 2, 3, 4, 5, 6]
    return {
        "pair_id": f"pair-{number}",
        "winner_latents": np.full(4, number, np.float32),
        "loser_latents": np.full(4, -number, np.float32),
        "winner_geometry": sizes,
        "loser_geometry": sizes,
    }


@pytest.mark.parametrize("size", [1, 7, 100, 256, 300, 1000])
def test_rows_written_in_parts_make_the_file_of_rows_written_at_once(
    tmp_path: Path, size: int
) -> None:
    write_table(tmp_path / "whole.parquet", ROWS, PROMPTS, **MADE)
    with writing_table(tmp_path / "parts.parquet", PROMPTS, **MADE) as writer:
        for start in range(0, len(ROWS), size):
            writer.write(ROWS[start : start + size])
    assert writer.num_rows == 1000
    whole, parts = (pq.ParquetFile(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    assert parts.read().equals(whole.read(), check_metadata=True)
    assert [parts.metadata.row_group(n).num_rows for n in range(4)] == [256, 256, 256, 232]
    assert read_metadata(tmp_path / "parts.parquet") == read_metadata(tmp_path / "whole.parquet")


def test_row_groups_of_large_rows_are_closed_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP_BYTES", 10_000)
    with writing_table(tmp_path / "pairs.parquet", PREFERENCES, **MADE) as writer:
        for number in range(10):
            row = pair_row(number)
            row["winner"] = image_value(bytes(4000))
            writer.write([row])
    groups = pq.ParquetFile(tmp_path / "pairs.parquet").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [3, 3, 3, 1]


@pytest.mark.parametrize("size", [1, 16])
def test_a_row_group_holds_about_one_prompts_images_and_dictionaries_are_for_text(
    tmp_path: Path, size: int
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            **prompt_row(f"prompt {number // 8}"),
            "candidate": number % 8,
            "seed": number,
            "image": image_value(rng.bytes(473_000)),
            "latents": rng.normal(size=16_384).astype(np.float32),
        }
        for number in range(32)
    ]
    with writing_table(tmp_path / "parts.parquet", CANDIDATES, **MADE) as writer:
        for start in range(0, len(rows), size):
            writer.write(rows[start : start + size])
    write_table(tmp_path / "whole.parquet", rows, CANDIDATES, **MADE)
    for name in ("parts", "whole"):
        groups = pq.ParquetFile(tmp_path / f"{name}.parquet").metadata
        assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [8, 8, 8, 8]
        encodings = {
            (column := groups.row_group(0).column(n)).path_in_schema: column.encodings
            for n in range(groups.num_columns)
        }
        with_dictionary = {path for path, used in encodings.items() if "RLE_DICTIONARY" in used}
        assert with_dictionary == {"prompt_id", "prompt"}


def test_a_table_without_rows_can_be_written(tmp_path: Path) -> None:
    with writing_table(tmp_path / "none.parquet", PROMPTS, **MADE):
        pass
    assert len(read_table(tmp_path / "none.parquet", PROMPTS)) == 0
    assert list(read_batches(tmp_path / "none.parquet", PROMPTS, size=3)) == []


def test_a_row_that_does_not_fit_leaves_the_old_table_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    write_table(path, ROWS[:2], PROMPTS, **MADE)
    before = path.read_bytes()
    message = "do not fit the prompts schema"
    with (
        pytest.raises(ArtifactError, match=message),
        writing_table(path, PROMPTS, **MADE) as writer,
    ):
        writer.write(ROWS)
        writer.write([{"prompt_id": "1", "prompt": None}])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [1, 100, 256, 999, 2000])
def test_batches_together_are_the_table(tmp_path: Path, size: int) -> None:
    path = tmp_path / "prompts.parquet"
    table = write_table(path, ROWS, PROMPTS, **MADE)
    batches = list(read_batches(path, PROMPTS, size=size))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert pa.concat_tables(batches).to_pylist() == table.to_pylist()
    assert num_rows(path) == 1000


def test_chosen_rows_are_read_wherever_they_lie(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    write_table(path, ROWS, PROMPTS, **MADE)
    rows = [0, 255, 256, 700, 701, 999]
    batches = read_batches(path, PROMPTS, ["prompt"], size=4, rows=rows)
    found = [batch.column("prompt").to_pylist() for batch in batches]
    expected = [ROWS[row]["prompt"] for row in rows]
    assert found == [expected[:4], expected[4:]]
    assert list(read_batches(path, PROMPTS, size=4, rows=[])) == []


def test_a_null_is_named_with_its_row_in_the_whole_table(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    rows = [dict(row) for row in ROWS]
    rows[700]["prompt"] = None
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=256)
    with pytest.raises(ArtifactError, match="'prompt' is null in row 700"):
        list(read_batches(path, PROMPTS, size=10))
    with pytest.raises(ArtifactError, match="'prompt' is null in row 700"):
        read_table(path, PROMPTS)


def test_pairs_and_latents_are_joined_across_different_row_groups(tmp_path: Path) -> None:
    pairs, latents = tmp_path / "pairs.parquet", tmp_path / "latents.parquet"
    write_table(pairs, [pair_row(n) for n in range(300)], PREFERENCES, **MADE)
    encoded = pa.Table.from_pylist([latents_row(n) for n in range(300)], PAIR_LATENTS.arrow)
    pq.write_table(encoded, latents, row_group_size=33)
    rows = list(range(0, 300, 7))
    found = [
        row
        for batch in joined_batches(pairs, latents, rows, size=8)
        for row in batch.select(["pair_id", "winner", "winner_latents"]).to_pylist()
    ]
    assert found == [
        {
            "pair_id": f"pair-{n}",
            "winner": image_value(b"w%d" % n),
            "winner_latents": [float(n)] * 4,
        }
        for n in rows
    ]


def test_latents_of_fewer_pairs_are_refused(tmp_path: Path) -> None:
    pairs, latents = tmp_path / "pairs.parquet", tmp_path / "latents.parquet"
    write_table(pairs, [pair_row(n) for n in range(4)], PREFERENCES, **MADE)
    write_table(latents, [latents_row(n) for n in range(3)], PAIR_LATENTS, **MADE)
    with pytest.raises(UserError, match="does not list the same pairs"):
        list(joined_batches(pairs, latents, [0], size=8))
