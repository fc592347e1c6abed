"""stages.profile: a stage's time, its trace, and what is kept when it ends the stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages import sample_candidates, select_prompts
from stages.profile import covered
from tests.builders import read_rows

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def sampling(args: sample_candidates.Args, prompts: Path, output: Path) -> list[str]:
    """The stage's line for all prompts, one at a time."""
    return [
        "stages.sample_candidates", "--prompts", str(prompts), "--model.base", str(args.model.base),
        "--model.dtype", args.model.dtype, "--policy", args.policy,
        "--settings.sampler", args.settings.sampler,
        "--settings.num-inference-steps", str(args.settings.num_inference_steps),
        "--settings.guidance-scale", str(args.settings.guidance_scale),
        "--candidates-per-prompt", "3", "--seed", "0", "--iteration", "1",
        "--shard", "0", "--num-shards", "1", "--prompts-per-batch", "1", "--output", str(output),
    ]  # fmt: skip


@pytest.mark.slow
def test_some_items_are_profiled_and_the_stage_goes_on_from_there(
    sampled: list[sample_candidates.Args], prompts: select_prompts.Args, tmp_path: Path
) -> None:
    line = sampling(sampled[0], prompts.output.resolve(), tmp_path / "shard-0.parquet")
    found = run(tmp_path, "stages.profile", "--items", "2", "--trace", "seen.json", *line)
    assert found.returncode == 0, found.stderr
    assert "items      2 in " in found.stdout
    assert "aten::" in found.stdout
    assert "% of one core" in found.stdout
    names = {
        event.get("name")
        for event in json.loads((tmp_path / "seen.json").read_text())["traceEvents"]
    }
    assert "aten::convolution" in names
    assert not (tmp_path / "shard-0.parquet").exists()  # ended after three of four prompts
    again = run(tmp_path, *line)
    assert again.returncode == 0, again.stderr
    rows = read_rows(tmp_path / "shard-0.parquet")
    assert len(rows) == 12
    exact = {
        (r["prompt_id"], r["candidate"]): r["seed"] for a in sampled for r in read_rows(a.output)
    }
    assert {(r["prompt_id"], r["candidate"]): r["seed"] for r in rows} == exact


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages.no_such_stage"], "there is no stage 'stages.no_such_stage'"),
        pytest.param(["json.tool"], "there is no stage 'json.tool'", marks=pytest.mark.slow),
        pytest.param(
            ["--items", "0", "stages.sample_candidates"],
            "--items must be at least 1, found 0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_profiled_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    found = run(tmp_path, "stages.profile", *words)
    assert found.returncode == 1
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_a_stage_of_few_items_is_told(tmp_path: Path) -> None:
    (tmp_path / "pool.txt").write_text("a cat\na dog\n")
    found = run(
        tmp_path, "stages.profile", "stages.select_prompts", "--pool", "pool.txt", "--shuffle-seed", "0", "--skip", "0",
        "--take", "1", "--output", "prompts.parquet",
    )  # fmt: skip
    assert found.returncode == 1
    assert "stages.select_prompts has had fewer than two items of work" in found.stderr
    assert len(read_rows(tmp_path / "prompts.parquet")) == 1


def test_intervals_are_counted_once_where_they_overlap() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4.0
    assert covered([]) == 0.0
