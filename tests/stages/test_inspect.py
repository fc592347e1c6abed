"""`python -m stages.inspect`: what it says of every table, what it finds odd, and how it refuses the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import inspect, train_seed
from stages.core.artifacts.schemas import (
    CANDIDATES,
    METRIC_SCORES,
    PREFERENCES,
    PROMPTS,
    REWARDS,
    Schema,
)
from stages.core.artifacts.tables import write_table
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError
from stages.core.inspection.columns import is_numeric
from stages.core.inspection.units import LAYOUTS, SCHEMAS, UNITS
from tests.builders import CAPTIONS, encoded, image_value, picture, prompt_row

ROOT = Path(__file__).resolve().parents[2]
IMAGES = [image_value(encoded(picture(CAPTIONS[0], strength=s), "PNG")) for s in (1.0, 0.5)]


def said(path: Path, **changes: Any) -> str:
    return "\n".join(inspect.lines_of(inspect.Args(path=path, **changes)))


def reward(prompt: str, candidate: int, value: float) -> dict[str, Any]:
    return {
        "prompt_id": prompt_id(prompt), "candidate": candidate, "reward": value,
        "standard_error": 1e-4, "policy_errors": [0.5, 0.25], "reference_errors": [0.5, 0.5],
        "timesteps": [1, 999], "draw_seed": 7,
    }  # fmt: skip


def pair(number: int, margin: float, error: float, **changes: Any) -> dict[str, Any]:
    return {
        "pair_id": f"pair-{number}", **prompt_row(CAPTIONS[number]), "winner": IMAGES[0],
        "loser": IMAGES[1], "source": "generated", "iteration": 1, "margin": margin,
        "margin_standard_error": error, "probability": 0.75, **changes,
    }  # fmt: skip


def written(path: Path, rows: list[dict[str, Any]], schema: Schema, **changes: Any) -> Path:
    write_table(path, rows, schema, stage="select_pairs", arguments={"dpo_beta": 5.0}, **changes)
    return path


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=lambda schema: schema.name)
def test_every_column_of_every_schema_has_a_meaning_and_every_number_a_unit(
    schema: Schema, tmp_path: Path
) -> None:
    for field in schema.arrow:
        assert len((field.metadata or {}).get(b"description", b"")) > 3, field.name
        assert (field.name in UNITS) == is_numeric(field.type), field.name
    assert schema.name in LAYOUTS
    assert {*LAYOUTS[schema.name].key, *LAYOUTS[schema.name].group} <= {*schema.arrow.names}
    # an empty table of it is told with all of its meanings
    lines = said(written(tmp_path / "table.parquet", [], schema)).splitlines()
    for field in schema.arrow:
        meaning = field.metadata[b"description"].decode()
        assert f"    {meaning}" in lines
    assert "  - it has no rows" in lines


def test_no_unit_and_no_layout_is_of_something_that_is_not_there() -> None:
    names = {name for schema in SCHEMAS.values() for name in schema.arrow.names}
    assert set(UNITS) <= names
    assert set(LAYOUTS) == set(SCHEMAS)
    assert len(SCHEMAS) >= 19


def test_a_table_is_told_with_units_quantiles_and_lineage(tmp_path: Path) -> None:
    prompts = written(tmp_path / "prompts.parquet", [prompt_row(c) for c in CAPTIONS], PROMPTS)
    rows = [reward(c, n, value) for c in CAPTIONS[:2] for n, value in enumerate((0.0, 0.5, 1.0))]
    path = tmp_path / "rewards.parquet"
    write_table(
        path, rows, REWARDS, stage="score_candidates",
        arguments={"num_draws": 2, "settings": {"reference": "base"}, "prompts": str(prompts)},
        inputs=[prompts],
    )  # fmt: skip
    text = said(path)
    assert f"{path}: rewards/1, 6 rows, 8 columns" in text
    assert "float [mean squared noise]" in text
    assert "implicit reward in mean squared noise, SAIL Eq. 8" in text
    assert "0 to 1; 5 % 0, median 0.5, 95 % 1; mean 0.5, 3 different" in text
    assert "0 (2), 1 (2), 2 (2)" in text  # candidates
    assert "2 values each, from 0.25 to 0.5" in text
    assert "Made by score_candidates, code " in text
    assert "(as it is now)" in text
    assert "  num_draws = 2\n  settings.reference = base\nFrom 1 files" in text  # no path twice
    assert f"  {prompts}  sha256 " in text
    assert text.endswith("Nothing odd was found.")
    assert "  there" in text
    assert "  the same" in said(path, verify=True)
    written(prompts, [prompt_row("another")], PROMPTS)
    assert "  another now" in said(path, verify=True)
    prompts.unlink()
    assert "  gone" in said(path)


def test_ties_repeats_uneven_groups_and_values_that_are_not_finite_are_found(
    tmp_path: Path,
) -> None:
    a, b = CAPTIONS[:2]
    rows = [reward(a, 0, 1.0), reward(a, 1, 1.0), reward(a, 1, np.nan), reward(b, 0, 1.0),
            reward(b, 1, 2.0) | {"policy_errors": [np.inf, 0.5]}]  # fmt: skip
    text = said(written(tmp_path / "rewards.parquet", rows, REWARDS))
    assert f"- 1 rows repeat another's prompt_id, candidate: first {prompt_id(a)}, 1" in text
    assert "- not every prompt has as many rows: 1 with 2, 1 with 3" in text
    assert "- in 1 of 2 groups of prompt_id the best or the worst reward is shared" in text
    assert "- reward: 1 values are nan or infinite" in text
    assert "- policy_errors: 1 values are nan or infinite" in text
    # of two metrics in a table each has its own ties
    scores = [{"prompt_id": prompt_id(a), "candidate": n, "metric": metric, "score": float(n)}
              for metric in ("one", "two") for n in range(2)]  # fmt: skip
    assert said(written(tmp_path / "scores.parquet", scores, METRIC_SCORES)).endswith(
        "Nothing odd was found."
    )


def test_unsure_margins_and_images_that_are_alike_are_found(tmp_path: Path) -> None:
    rows = [pair(0, 3.0, 1.0), pair(1, 1.9, 1.0), pair(2, -4.0, 1.0), pair(3, 9.0, 0.0),
            pair(4, 9.0, 1.0, loser=IMAGES[0])]  # fmt: skip
    text = said(written(tmp_path / "pairs.parquet", rows, PREFERENCES))
    assert "5 of 64 x 64 PNG" in text
    assert "- 1 of 5 generated pairs have a margin within 2 standard errors of 0" in text
    assert "- 1 of 5 generated pairs have no margin above 0" in text
    assert "- winner and loser are the same image in 1 of 5 pairs" in text
    assert "- source" not in text  # null in all rows, as it may be
    assert "- winner: 4 images are byte for byte the same as another row's" in text
    assert "source_row" in text
    assert "int64 [number, from 0], 5 of 5 null" in text
    broken = [pair(0, 3.0, 1.0, winner=image_value(b"no image"))]
    assert "- winner, row 0: no readable image" in said(
        written(tmp_path / "broken.parquet", broken, PREFERENCES)
    )
    nothing = [pair(0, 3.0, 1.0, loser={"bytes": None, "path": None})]
    text = said(written(tmp_path / "nothing.parquet", nothing, PREFERENCES))
    assert "    no image" in text
    assert "- loser: 1 images have no bytes" in text


def test_tables_of_other_making_and_of_other_versions_are_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "foreign.parquet"
    odd = pa.table(
        {"label": [1, None], "name\x1b[2J": ["\x1b]0;owned\x07", "b"], "when": [{"a": 1}] * 2}
    )
    pq.write_table(odd, path)
    text = said(path)
    assert "a table of other making, 2 rows" in text
    assert "it records no stage that made it" in text
    done = subprocess.run(
        [sys.executable, "-m", "stages.inspect", str(path)], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "\x1b" not in done.stdout
    older = PROMPTS.with_metadata({"sail_schema": "prompts/0", "sail_stage": "no_such_stage"})
    table = pa.Table.from_pylist([prompt_row("a")], schema=older).append_column(
        "more", pa.array([1])
    )
    pq.write_table(table.drop_columns(["prompt"]), path)
    text = said(path)
    assert "- it was written as prompts/0; this version of SAIL knows prompts/1" in text
    assert "- column 'prompt' of its schema is missing" in text
    assert "- column 'more' is not in its schema" in text
    assert "Made by no_such_stage" in text
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    with pytest.raises(UserError, match="two columns 'a'"):
        said(path)


@pytest.mark.parametrize("where", ["head", "middle", "tail"])
def test_a_damaged_table_is_refused_by_its_name(where: str, tmp_path: Path) -> None:
    rows = [{**prompt_row(c), "candidate": 0, "seed": 1, "image": IMAGES[0], "latents": noise.tolist()}
            for c in CAPTIONS
            for noise in [np.random.default_rng(0).normal(size=4096).astype(np.float32)]]  # fmt: skip
    path = written(tmp_path / "candidates.parquet", rows, CANDIDATES)
    data = bytearray(path.read_bytes())
    place = {"head": 40, "middle": len(data) // 2, "tail": len(data) - 8}[where]
    data[place : place + 8] = bytes(byte ^ 0xFF for byte in data[place : place + 8])
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"candidates.parquet is no readable .*delete it and call snakemake"
    ):
        said(path)
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(UserError, match="candidates.parquet is no readable"):
        said(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.parquet", None, "does not exist; expected a table"),
        ("page.html", b"<html>", "begins with b'<htm'; expected a Parquet table"),
        ("text.parquet", b"prompt,label", "no readable Parquet file"),
        ("record.json", b"{", "no readable JSON file"),
        ("list.json", b"[1]", "holds list; expected a JSON object"),
        ("empty", b"", "begins with b''"),
    ],
)
def test_what_is_no_file_of_a_run_is_refused(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        said(tmp_path / name)
    assert name in str(refused.value)


def test_a_policy_is_told_by_its_manifest_and_its_files_are_checked(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    text = said(seed_trained.output)
    assert "kind = full" in text
    assert "unet/diffusion_pytorch_model.safetensors: " in text
    assert "Made by train_seed" in text
    assert text.endswith("Nothing odd was found.")
    folder = tmp_path / "policy"
    (folder / "unet").mkdir(parents=True)
    for path in seed_trained.output.rglob("*"):
        if path.is_file() and path.name != "config.json":
            (folder / path.relative_to(seed_trained.output)).write_bytes(path.read_bytes())
    weights = next(folder.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    text = said(folder)
    assert "- unet/diffusion_pytorch_model.safetensors is not what the manifest lists" in text
    assert "- unet/config.json is listed and missing" in text
    (folder / "manifest.json").write_text(json.dumps({"files": {"../outside": "0"}}))
    assert "lies outside of its folder" in said(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="A policy whose training has not ended"):
        said(folder)


def test_a_folder_of_tables_is_a_line_each(tmp_path: Path) -> None:
    written(tmp_path / "run/prompts/iter01.parquet", [prompt_row("a")], PROMPTS)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "run/other.parquet")
    text = said(tmp_path / "run")
    assert "2 tables" in text
    assert "prompts/iter01.parquet: 1 rows, 0.00 MB, prompts/1, by select_pairs" in text
    assert "other.parquet: 1 rows, 0.00 MB, of other making, by nobody known" in text


def test_help_teaches() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages.inspect", "--help"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    words = " ".join(done.stdout.replace("│", " ").split())
    assert "python -m stages.inspect results/shapes/iter01/pairs.parquet --verify" in words
    assert "what each column means" in words
