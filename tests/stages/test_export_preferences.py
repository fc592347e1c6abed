"""Exported pairs open in pandas, DuckDB and datasets, and come back as the same pairs."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages import export_preferences, import_preferences
from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.schemas import PICKAPIC, PREFERENCES
from stages.core.artifacts.tables import write_table
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError
from stages.core.export.markdown import read_front_matter
from tests import label_files
from tests.builders import CAPTIONS, encoded, image_value, picture

NUM_PAIRS = 23
PAIR = ("prompt", "winner", "loser")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def preference(number: int) -> dict[str, Any]:
    """A pair of distinct images; human (JPEG) or generated (PNG)."""
    is_human = number % 3 == 0
    caption = CAPTIONS[number % 10]
    rng = np.random.default_rng(number)
    noise = rng.integers(0, 256, (16, 16, 3), np.uint8)
    kind = "JPEG" if is_human else "PNG"
    made: dict[str, Any] = {"source": "human", "iteration": 0, "source_row": number}
    if not is_human:
        made = {
            "source": "generated",
            "iteration": 1,
            "policy_digest": "0123456789abcdef",
            "winner_seed": 2**53 + number,
            "loser_seed": 2,
            "winner_candidate": 3,
            "loser_candidate": 4,
            "winner_score": 0.5,
            "loser_score": -0.25,
            "margin": 0.75,
            "probability": 0.9,
        }
    return {
        "pair_id": f"pair-{number:03d}",
        "prompt_id": prompt_id(caption),
        "prompt": caption,
        "winner": image_value(
            encoded(picture(caption)[::2, ::2] // 2 + noise.repeat(2, 0).repeat(2, 1) // 2, kind)
        ),
        "loser": image_value(encoded(noise, kind)),
        **made,
    }


@pytest.fixture
def pairs(tmp_path: Path) -> list[dict[str, Any]]:
    """The rows that `preferences` holds."""
    return [preference(number) for number in range(NUM_PAIRS)]


@pytest.fixture
def preferences(tmp_path: Path, pairs: list[dict[str, Any]]) -> Path:
    """A table of human and generated pairs."""
    path = tmp_path / "run" / "preferences.parquet"
    arguments = {"seed_fraction": 0.25, "pairs": "/home/someone/pairs.parquet"}
    write_table(path, pairs, PREFERENCES, stage="mix_preferences", arguments=arguments)
    return path


def export(table: Path, kind: str, **changes: Any) -> Path:
    args = export_preferences.Args(
        preferences=(table,),
        format=kind,  # type: ignore[arg-type]
        output=table.parent / kind,
        pairs_per_shard=10,
    )
    args = replace(args, **changes)
    export_preferences.main(args)
    return args.output


def triples(rows: list[dict[str, Any]], names: tuple[str, str, str]) -> set[tuple[Any, ...]]:
    def plain(value: Any) -> Any:
        return value["bytes"] if isinstance(value, dict) else value

    return {tuple(plain(row[name]) for name in names) for row in rows}


def load(path: Path) -> Any:
    """The dataset in a folder, found through its own card."""
    return datasets.load_dataset(str(path), split="train")


def test_pickapic_has_its_nineteen_columns_and_mixed_sides(
    preferences: Path, pairs: list[dict[str, Any]]
) -> None:
    folder = export(preferences, "pickapic")
    shards = sorted((folder / "data").iterdir())
    assert [shard.name for shard in shards] == [f"train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [10, 10, 3]
    for shard in shards:
        assert pq.read_schema(shard).equals(PICKAPIC)
    rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
    assert len(rows[0]) == 19
    zero_wins = sum(row["label_0"] for row in rows)
    assert 5 < zero_wins < 18
    for row, pair in zip(rows, pairs, strict=True):
        winner = int(row["label_1"])
        assert (row["label_0"], row["label_1"]) == ((1.0, 0.0), (0.0, 1.0))[winner]
        assert row[f"jpg_{winner}"] == pair["winner"]["bytes"]
        assert row[f"jpg_{1 - winner}"] == pair["loser"]["bytes"]
        assert row["best_image_uid"] == row[f"image_{winner}_uid"] != row[f"image_{1 - winner}_uid"]
        assert row["has_label"] is row["are_different"] is True
        assert row["num_example_per_prompt"] == sum(p["prompt"] == pair["prompt"] for p in pairs)
    assert export(preferences, "pickapic", output=folder.parent / "again").is_dir()
    for shard in shards:
        assert (folder.parent / "again" / "data" / shard.name).read_bytes() == shard.read_bytes()


def test_pickapic_imports_again_as_the_same_pairs(
    preferences: Path, pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = export(preferences, "pickapic")
    args = import_preferences.Args(
        files=tuple(sorted((folder / "data").iterdir())),
        num_pairs=None,
        num_holdout=1,
        seed=0,
        preferences=tmp_path / "again.parquet",
        holdout=tmp_path / "holdout.parquet",
        summary=tmp_path / "import.json",
    )
    import_preferences.main(args)
    counts = json.loads(args.summary.read_text())
    assert counts["rows_read"] == NUM_PAIRS
    # One prompt is held out, of which one pair is asked for; its other pairs are left over.
    found = [
        row for path in (args.preferences, args.holdout) for row in pq.read_table(path).to_pylist()
    ]
    assert len(found) == NUM_PAIRS - counts["pairs_left_over"]
    held_out = pq.read_table(args.holdout).to_pylist()[0]["prompt"]
    expected = [pair for pair in pairs if pair["prompt"] != held_out]
    kept = pq.read_table(args.preferences).to_pylist()
    assert triples(kept, PAIR) == triples(expected, PAIR)
    assert triples(found, PAIR) <= triples(pairs, PAIR)
    args = replace(args, seed=1)  # another prompt is held out: now those of the first are there
    import_preferences.main(args)
    kept += pq.read_table(args.preferences).to_pylist()
    assert triples(kept, PAIR) == triples(pairs, PAIR)


def import_all(files: Path, folder: Path) -> Path:
    """Everything in some files or a folder, whatever its layout, as a table of preferences."""
    args = import_preferences.Args(
        files=(files,),
        num_pairs=None,
        num_holdout=0,
        seed=0,
        preferences=folder / "preferences.parquet",
        holdout=folder / "holdout.parquet",
        summary=folder / "import.json",
    )
    import_preferences.main(args)
    return args.preferences


FORMATS = ("pickapic", "preference", "imagefolder", "webdataset")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", label_files.WRITERS)
def test_every_layout_imported_exported_and_imported_again_is_the_same_pairs(
    tmp_path: Path, layout: str, kind: str
) -> None:
    expected = set(label_files.some_pairs())
    label_files.WRITERS[layout][1](tmp_path / "labels", label_files.some_pairs())
    first = import_all(tmp_path / "labels", tmp_path / "first")
    assert triples(pq.read_table(first).to_pylist(), PAIR) == expected
    again = import_all(export(first, kind), tmp_path / "again")
    assert triples(pq.read_table(again).to_pylist(), PAIR) == expected


@pytest.mark.parametrize("kind", ["pickapic", "preference"])
def test_pandas_duckdb_and_datasets_read_the_parquet(
    preferences: Path, pairs: list[dict[str, Any]], kind: str
) -> None:
    folder = export(preferences, kind)
    files = str(folder / "data" / "*.parquet")
    frame = pd.concat(pd.read_parquet(path) for path in sorted((folder / "data").iterdir()))
    assert len(frame) == NUM_PAIRS
    if kind == "pickapic":
        size = duckdb.sql(f"select sum(octet_length(jpg_0) + octet_length(jpg_1)) from '{files}'")
        decoded = load(folder).cast_column("jpg_0", datasets.Image())[0]["jpg_0"]
    else:
        size = duckdb.sql(
            f"select sum(octet_length(chosen.bytes) + octet_length(rejected.bytes)) from '{files}'"
        )
        decoded = load(folder)[0]["chosen"]
        assert triples(frame.to_dict("records"), ("prompt", "chosen", "rejected")) == triples(
            pairs, PAIR
        )
        assert load(folder)[1]["seed_chosen"] == 2**53 + 1
        assert load(folder)[1]["chosen_score"] == 0.5
    expected = sum(len(pair[side]["bytes"]) for pair in pairs for side in ("winner", "loser"))
    assert size.fetchall() == [(expected,)]
    assert decoded.size in ((32, 32), (16, 16))


def test_our_own_tables_open_as_they_are(preferences: Path, pairs: list[dict[str, Any]]) -> None:
    files = str(preferences)
    loaded = datasets.load_dataset("parquet", data_files=files, split="train")
    for row, pair in zip(loaded, pairs, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(pair["winner"]["bytes"])).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(row["winner"].convert("RGB")), pixels)
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    assert next(iter(stream))["loser"].size == (16, 16)
    assert triples(pd.read_parquet(preferences).to_dict("records"), PAIR) == triples(pairs, PAIR)
    counted = duckdb.sql(f"select source, count(*) from '{files}' group by 1 order by 1").fetchall()
    assert counted == [("generated", 15), ("human", 8)]


def test_imagefolder_gives_both_images_of_every_pair(
    preferences: Path, pairs: list[dict[str, Any]]
) -> None:
    folder = export(preferences, "imagefolder")
    lines = [json.loads(line) for line in (folder / "data/metadata.jsonl").read_text().splitlines()]
    read = [
        {
            "prompt": line["prompt"],
            "winner": (folder / "data" / line["chosen_file_name"]).read_bytes(),
            "loser": (folder / "data" / line["rejected_file_name"]).read_bytes(),
        }
        for line in lines
    ]
    assert triples(read, PAIR) == triples(pairs, PAIR)
    assert lines[0]["chosen_file_name"] == "0000/000000.chosen.jpg"
    assert lines[1]["chosen_file_name"] == "0000/000001.chosen.png"
    for loaded in (
        load(folder),
        datasets.load_dataset("imagefolder", data_dir=str(folder / "data"), split="train"),
    ):
        assert len(loaded) == NUM_PAIRS
        assert {row["prompt"] for row in loaded} == {pair["prompt"] for pair in pairs}
        assert loaded[0]["chosen"].size == (32, 32)
        assert loaded[0]["rejected"].size == (16, 16)


def test_webdataset_gives_both_images_of_every_pair(
    preferences: Path, pairs: list[dict[str, Any]]
) -> None:
    folder = export(preferences, "webdataset", source="generated")
    read: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "data").iterdir()):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, end = member.name.partition(".")
                read.setdefault(key, {})[end] = archive.extractfile(member).read()  # type: ignore[union-attr]
    rows = [
        {
            "prompt": json.loads(row["json"])["prompt"],
            "winner": row["chosen.png"],
            "loser": row["rejected.png"],
        }
        for row in read.values()
    ]
    generated = [pair for pair in pairs if pair["source"] == "generated"]
    assert len(rows) == len(generated)
    assert triples(rows, PAIR) == triples(generated, PAIR)
    loaded = load(folder)
    assert len(loaded) == len(generated)
    assert loaded[0]["chosen.png"].size == (32, 32)
    assert loaded[0]["json"]["prompt"] == generated[0]["prompt"]


def test_webdataset_keeps_every_image_whatever_its_kind_and_whatever_is_null_first(
    tmp_path: Path, pairs: list[dict[str, Any]]
) -> None:
    human = [pair for pair in pairs if pair["source"] == "human"]
    generated = [pair for pair in pairs if pair["source"] == "generated"]
    table = tmp_path / "mixed.parquet"
    write_table(table, [*human, *generated], PREFERENCES, stage="mix_preferences", arguments={})
    loaded = load(export(table, "webdataset"))
    assert len(loaded) == NUM_PAIRS
    (chosen,) = (name for name in loaded.column_names if name.startswith("chosen."))
    (rejected,) = (name for name in loaded.column_names if name.startswith("rejected."))
    by_name = {pair["pair_id"]: pair for pair in pairs}
    for row in loaded:
        pair = by_name.pop(row["json"]["pair_id"])
        assert row["json"]["chosen_score"] == pair.get("winner_score")
        assert row["json"]["seed_chosen"] == pair.get("winner_seed")
        for name, side in ((chosen, "winner"), (rejected, "loser")):
            expected = Image.open(io.BytesIO(pair[side]["bytes"])).convert("RGB")
            assert np.array_equal(np.asarray(row[name].convert("RGB")), np.asarray(expected))
    assert not by_name


def test_the_card_tells_where_the_pairs_come_from(preferences: Path) -> None:
    card = export(preferences, "preference") / "README.md"
    assert read_front_matter(card)["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/train-*.parquet"}
    ]
    text = card.read_text()
    assert "23 pairs of images of 10 prompts" in text
    assert "| human | 0 | 8 | - |" in text
    assert "| generated | 1 | 15 | 0123456789abcdef |" in text
    assert "by `mix_preferences`" in text
    assert "| `seed_fraction` | `0.25` |" in text
    assert "/home/someone" not in text
    manifest = json.loads((card.parent / "manifest.json").read_text())
    assert manifest["facts"] == {"format": "preference", "num_pairs": 23, "num_prompts": 10}
    assert len(manifest["files"]) == 3


def test_a_row_group_is_small_whatever_the_shard(preferences: Path) -> None:
    path = next((export(preferences, "preference", pairs_per_shard=1000) / "data").iterdir())
    assert path.name == "train-00000-of-00001.parquet"
    rows = [preference(n) for n in range(150)]
    table = preferences.parent / "long.parquet"
    write_table(table, rows, PREFERENCES, stage="mix_preferences", arguments={})
    folder = export(table, "pickapic", pairs_per_shard=1000, output=table.parent / "long")
    found = pq.ParquetFile(next((folder / "data").iterdir())).metadata
    assert [found.row_group(n).num_rows for n in range(found.num_row_groups)] == [64, 64, 22]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "generated"}, "there is no generated pair to export"),
        ({"pairs_per_shard": 0}, "--pairs-per-shard must be 1 or more, found 0"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "run" / "human.parquet"
    write_table(path, [preference(0)], PREFERENCES, stage="import_preferences", arguments={})
    with pytest.raises(UserError, match=message):
        export(path, "pickapic", **change)
    assert list(path.parent.iterdir()) == [path]


def test_a_wrong_table_is_refused_by_column(preferences: Path, tmp_path: Path) -> None:
    other = tmp_path / "run" / "other.parquet"
    pq.write_table(pa.table({"caption": ["a"]}), other)
    with pytest.raises(ArtifactError, match="column 'pair_id' is missing"):
        export(other, "pickapic")
    with pytest.raises(ArtifactError, match="no readable Parquet file"):
        export(tmp_path / "run" / "none.parquet", "pickapic")
    with pytest.raises(UserError, match="pair-000 is there twice"):
        export(preferences, "pickapic", preferences=(preferences, preferences))


def test_an_image_without_bytes_stops_the_export_and_leaves_the_last_one(
    preferences: Path,
) -> None:
    folder = export(preferences, "webdataset")
    before = {path.name: path.read_bytes() for path in (folder / "data").iterdir()}
    broken = [preference(0), {**preference(1), "loser": {"bytes": None, "path": "x.png"}}]
    path = preferences.parent / "broken.parquet"
    write_table(path, broken, PREFERENCES, stage="mix_preferences", arguments={})
    with pytest.raises(UserError, match="pair pair-001: the loser has no bytes"):
        export(path, "webdataset", output=folder)
    assert {path.name: path.read_bytes() for path in (folder / "data").iterdir()} == before
    assert not list(folder.parent.glob(".*"))


def test_a_table_still_refuses_a_pair_without_an_image(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="column 'winner' has nulls"):
        write_table(
            tmp_path / "t.parquet",
            [{**preference(0), "winner": None}],
            PREFERENCES,
            stage="mix_preferences",
            arguments={},
        )


def test_something_else_is_never_replaced(preferences: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# My own notes\n")
    with pytest.raises(UserError, match="a folder that no export wrote"):
        export(preferences, "pickapic", output=tmp_path / "mine")
    with pytest.raises(UserError, match="exists already and is a file"):
        export(preferences, "pickapic", output=preferences)
