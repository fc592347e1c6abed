"""One flipped bit in a table stops every stage that reads it; the message names the file."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages import (
    encode_preferences,
    generate_evaluation,
    import_preferences,
    measure_diversity,
    mix_preferences,
    sample_candidates,
    score_candidates,
    score_holdout,
    score_metric,
    select_pairs,
    select_prompts,
    train_seed,
    update_policy,
)
from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.schemas import PREFERENCES
from stages.core.artifacts.tables import read_table
from stages.core.errors import UserError

STAGES: dict[str, ModuleType] = {
    "encoded": encode_preferences,
    "seed_trained": train_seed,
    "prompts": select_prompts,
    "sampled": sample_candidates,
    "scored": score_candidates,
    "candidate_scores": score_metric,
    "selected": select_pairs,
    "mixed": mix_preferences,
    "updated": update_policy,
    "evaluated": generate_evaluation,
    "judged": score_holdout,
    "diversity": measure_diversity,
}
"""Stages by the fixture that has their arguments."""


def tables_in(value: Any) -> Iterator[Path]:
    """The Parquet files that arguments name and that are there."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tables_in(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tables_in(each)
    elif isinstance(value, Path) and value.suffix == ".parquet" and value.is_file():
        yield value


def exchanged(value: Any, old: Path, new: Path, outputs: set[Path], folder: Path) -> Any:
    """The arguments with one input exchanged, and all outputs in another folder."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {
            field.name: exchanged(getattr(value, field.name), old, new, outputs, folder)
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **changes)
    if isinstance(value, tuple):
        return tuple(exchanged(each, old, new, outputs, folder) for each in value)
    if value == old:
        return new
    is_output = isinstance(value, Path) and value in outputs
    return folder / value.name if is_output else value


def flip(path: Path, damaged: Path) -> Path:
    """A copy with one bit exchanged in the last page of every column."""
    shutil.copy(path, damaged)
    content = bytearray(damaged.read_bytes())
    metadata = pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            content[start + chunk.total_compressed_size - 1] ^= 1
    damaged.write_bytes(bytes(content))
    return damaged


OUTPUTS = {"output", "training", "held_out_curve", "work", "summary"}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_refuses_each_of_its_tables_with_a_flipped_bit(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    found = request.getfixturevalue(name)
    args = next(iter(found.values())) if isinstance(found, dict) else found[0] if isinstance(found, list) else found  # fmt: skip
    if name == "prompts":  # whose fixture excludes a file that no stage has made
        imported = request.getfixturevalue("imported")
        args = dataclasses.replace(args, exclude=(imported.preferences,))
    outputs = {getattr(args, field) for field in OUTPUTS if hasattr(args, field)}
    inputs = sorted(set(tables_in(args)) - outputs)
    assert inputs
    for number, path in enumerate(inputs):
        folder = tmp_path / str(number)
        folder.mkdir()
        damaged = flip(path, folder / f"damaged-{path.name}")
        with pytest.raises(UserError, match=f"damaged-{path.name} is no readable Parquet"):
            STAGES[name].main(exchanged(args, path, damaged, outputs, folder / "out"))
        made = list((folder / "out").rglob("*.parquet"))
        assert not made, made


def test_the_message_says_what_to_do(imported: import_preferences.Args, tmp_path: Path) -> None:
    damaged = flip(imported.preferences, tmp_path / "damaged.parquet")
    with pytest.raises(ArtifactError, match="CRC checksum verification failed.*delete it and call"):
        read_table(damaged, PREFERENCES)
