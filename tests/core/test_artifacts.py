"""Tables and policy folders: complete or not at all, checked when read, and saying how they came."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.artifacts.files import replacing, write_json, write_text
from stages.core.artifacts.fingerprint import code_version
from stages.core.artifacts.provenance import (
    ArtifactError,
    digest,
    policy_digest,
    policy_name,
    provenance,
    write_manifest,
)
from stages.core.artifacts.schemas import CANDIDATES, METRIC_SCORES, PROMPTS
from stages.core.artifacts.tables import read_metadata, read_table, read_tables, write_table
from tests.builders import prompt_row, write_rows

ROWS = [prompt_row("a cat"), prompt_row("a dog")]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Some stage's arguments."""

    pool: Path
    take: int


def write(path: Path, rows: object = ROWS, **options: object) -> pa.Table:
    values: dict[str, object] = {"stage": "select_prompts", "arguments": {"take": 2}, **options}
    return write_table(path, rows, PROMPTS, **values)  # type: ignore[arg-type]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "prompts.parquet"
    write(path)
    assert read_table(path, PROMPTS).to_pylist() == ROWS
    assert read_table(path, PROMPTS, ["prompt"]).column_names == ["prompt"]
    assert read_tables([path, path], PROMPTS).to_pylist() == ROWS + ROWS
    assert names(path.parent) == ["prompts.parquet"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt_id": "1", "prompt": None}],
        [{"prompt_id": "1"}],
        [{"prompt_id": 1, "prompt": "a cat"}],
        pa.table({"prompt": ["a cat"]}),
        pa.table({"prompt_id": ["1"], "prompt": pa.array([None], pa.string())}),
    ],
)
def test_rows_that_do_not_fit_leave_the_old_table_and_nothing_else(
    tmp_path: Path, rows: object
) -> None:
    path = tmp_path / "prompts.parquet"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="do not fit the prompts schema") as caught:
        write(path, rows)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["prompts.parquet"]


def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"rows": 1})
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == {"rows": 1}
    assert names(tmp_path) == ["summary.json"]


def test_a_file_that_is_being_written_does_not_stand_at_its_place_yet(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    with replacing(path) as part:
        part.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"


def test_a_missing_column_is_named_with_the_file_and_what_there_is(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "prompts.parquet", [{"prompt_id": "1", "caption": "a cat"}])
    with pytest.raises(
        ArtifactError, match=r"no column 'prompt' \(found: prompt_id, caption\)"
    ) as e:
        read_table(path, PROMPTS)
    assert str(path) in str(e.value)


def test_a_column_of_another_type_is_named_with_both_types(tmp_path: Path) -> None:
    row = {"prompt_id": "1", "candidate": 0, "metric": "total", "score": 1.0}
    path = write_rows(tmp_path / "scores.parquet", [row])
    with pytest.raises(ArtifactError, match="'candidate' is int64, expected int32") as caught:
        read_table(path, METRIC_SCORES)
    assert str(path) in str(caught.value)


def test_a_null_is_named_with_its_column_and_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "prompts.parquet", [*ROWS, {"prompt_id": "1", "prompt": None}])
    with pytest.raises(ArtifactError, match="'prompt' is null in row 2") as caught:
        read_table(path, PROMPTS)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "does not exist"), (b"PAR1", "no readable Parquet file")]
)
def test_a_file_that_is_no_table_is_named(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "prompts.parquet"
    if content is not None:
        path.write_bytes(content)
    for read in (lambda: read_table(path, PROMPTS), lambda: read_metadata(path)):
        with pytest.raises(ArtifactError, match=reason) as caught:
            read()
        assert str(path) in str(caught.value)


def test_metadata_tells_schema_stage_arguments_code_and_input_digests(tmp_path: Path) -> None:
    pool, path = tmp_path / "pool.txt", tmp_path / "prompts.parquet"
    pool.write_text("a cat\n")
    write(path, arguments=Args(pool=pool, take=2), inputs=[pool])
    assert read_metadata(path) == {
        "schema": "prompts/1",
        "stage": "select_prompts",
        "code": code_version("stages.select_prompts"),
        "arguments": {"pool": str(pool), "take": 2},
        "inputs": {str(pool): hashlib.sha256(b"a cat\n").hexdigest()},
    }


@pytest.mark.parametrize("code", ["123456789012", "12e345678901"])
def test_a_code_version_of_digits_alone_stays_text(tmp_path: Path, code: str) -> None:
    table = pa.Table.from_pylist(ROWS, schema=PROMPTS.with_metadata({"sail_code": code}))
    pq.write_table(table, tmp_path / "prompts.parquet")
    assert read_metadata(tmp_path / "prompts.parquet")["code"] == code


def test_hugging_face_datasets_is_told_which_columns_are_images() -> None:
    metadata = CANDIDATES.with_metadata({}).metadata
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    assert list(features) == CANDIDATES.arrow.names
    assert features["image"] == {"_type": "Image"}
    assert features["seed"] == {"dtype": "int64", "_type": "Value"}
    assert features["latents"]["feature"] == {"dtype": "float32", "_type": "Value"}


def test_written_tables_carry_the_hugging_face_features(tmp_path: Path) -> None:
    write(tmp_path / "prompts.parquet")
    metadata = pq.read_schema(tmp_path / "prompts.parquet").metadata
    assert json.loads(metadata[b"huggingface"]) == {
        "info": {
            "features": {n: {"dtype": "string", "_type": "Value"} for n in PROMPTS.arrow.names}
        }
    }


def test_an_input_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.txt does not exist"):
        provenance("select_prompts", {}, [tmp_path / "none.txt"])


def policy(folder: Path, weights: bytes = b"weights") -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_bytes(weights)
    write_manifest(folder, stage="train_seed", arguments={}, inputs=[], facts={"num_steps": 3})
    return folder


def test_a_manifest_lists_every_file_with_its_digest_and_the_facts(tmp_path: Path) -> None:
    manifest = json.loads((policy(tmp_path / "one") / "manifest.json").read_text())
    assert manifest["files"] == {"unet/weights": hashlib.sha256(b"weights").hexdigest()}
    assert manifest["num_steps"] == 3
    assert manifest["sail_stage"] == "train_seed"
    assert manifest["sail_arguments"] == {}


def test_policies_of_the_same_weights_have_the_same_digest_and_of_others_another(
    tmp_path: Path,
) -> None:
    one, same = policy(tmp_path / "one"), policy(tmp_path / "same")
    other = policy(tmp_path / "other", b"other weights")
    assert policy_digest(one) == policy_digest(same) != policy_digest(other)
    assert policy_name(str(one)) == policy_digest(one)
    assert policy_name("base") == "base"


def test_a_policy_without_manifest_is_refused_as_unfinished(tmp_path: Path) -> None:
    folder = policy(tmp_path / "one")
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="no finished policy"):
        policy_digest(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"files": '])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    folder = policy(tmp_path / "one")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="manifest.json is no readable manifest"):
        policy_digest(folder)


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_policy_whose_weights_are_damaged_is_refused_with_the_file(
    tmp_path: Path, damage: str
) -> None:
    folder = policy(tmp_path / "one")
    weights = folder / "unet" / "weights"
    if damage == "change":
        weights.write_bytes(b"Weights")
    else:
        weights.unlink()
    with pytest.raises(ArtifactError, match="is missing or is not what manifest.json lists") as e:
        policy_digest(folder)
    assert str(weights) in str(e.value)


def test_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert digest(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_one_s_is_not(
    tmp_path: Path,
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "table[1].parquet"
    dead = tmp_path / f".{path.name}.{ended.pid}.part"
    folder = tmp_path / f".{path.name}.{ended.pid}.old"
    living = tmp_path / f".{path.name}.{os.getppid()}.part"
    other = tmp_path / f".another.parquet.{ended.pid}.part"
    for file in (dead, living, other):
        file.write_text("half")
    folder.mkdir()
    write_text(path, "whole")
    assert path.read_text() == "whole"
    assert set(tmp_path.iterdir()) == {path, living, other}
