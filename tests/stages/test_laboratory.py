"""record_experiment and summarise_laboratory: from finished runs to a table, a CSV and a page."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pytest

from stages import record_experiment, summarise_laboratory
from stages.core.artifacts.schemas import SUMMARY
from stages.core.artifacts.tables import write_table
from stages.core.errors import UserError
from stages.core.evaluation.guards import GUARDS_TABLE
from tests.builders import read_rows

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = """
title: Two arms
source: Asked by a test.
seeds: [1, 2]
arms:
  usual: {}
  none: {mix_preferences: {seed_fraction: 0.0}}
claims:
  - says: The usual is better
    compare: [{measure: total, left: usual/last, right: none/last}]
"""


def summary_row(policy: str, mean: float, baseline: str, baseline_mean: float) -> dict[str, Any]:
    numbers = {field.name: 0 for field in SUMMARY.arrow if field.name not in ("better_of_two",)}
    return numbers | {
        "prompt_set": "shapes", "metric": "total", "policy": policy, "baseline": baseline,
        "mean": mean, "baseline_mean": baseline_mean,
    }  # fmt: skip


def finish(folder: Path, name: str, gain: float) -> None:
    """A finished run whose policy 1 is `gain` above 2.5, and its record."""
    evaluation = folder / "results" / name / "evaluation"
    rows = [
        summary_row("iter00", 2.5, "base", 2.4),
        summary_row("iter01", 2.5 + gain, "base", 2.4),
        summary_row("iter01", 2.5 + gain, "results/other/iter01", 9.0),
    ]
    write_table(evaluation / "summary.parquet", rows, SUMMARY, stage="s", arguments={})
    guards = []
    for number in range(2):
        row: dict[str, Any] = {
            f.name: None if f.nullable else "perceptual" if f.type == pa.string() else 0
            for f in GUARDS_TABLE.arrow
        }
        guards.append(
            row | {"iteration": number, "policy": f"iter{number:02d}", "reward_accuracy": 0.7}
        )
    guards[1]["rank_correlation"] = 0.25
    write_table(evaluation / "guards.parquet", guards, GUARDS_TABLE, stage="s", arguments={})
    record_experiment.main(
        record_experiment.Args(
            run=name, command="snakemake ...", begun=int(time.time()) - 60,
            output=folder / "results" / "lab" / "runs" / f"{name}.json",
        )
    )  # fmt: skip


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> summarise_laboratory.Args:
    """An experiment of four runs: two finished, one begun, one not."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "two.yaml"
    path.write_text(EXPERIMENT)
    finish(tmp_path, "lab-two-usual-1", 0.3)
    finish(tmp_path, "lab-two-none-1", 0.1)
    begun = tmp_path / "results" / "lab" / "begun"
    begun.mkdir()
    for name in ("lab-two-usual-1", "lab-two-none-1", "lab-two-usual-2"):
        (begun / name).touch()
    lab = tmp_path / "results" / "lab"
    return summarise_laboratory.Args(
        experiments=(path,), base=(ROOT / "config" / "config.yaml",), lab=lab,
        results=tmp_path / "results", output=lab / "results.parquet", csv=lab / "results.csv",
        page=tmp_path / "page.md",
    )  # fmt: skip


def test_every_run_is_in_the_table_finished_or_not(args: summarise_laboratory.Args) -> None:
    summarise_laboratory.main(args)
    rows = read_rows(args.output)
    status = {row["run"]: row["status"] for row in rows}
    assert status == {
        "lab-two-usual-1": "finished",
        "lab-two-none-1": "finished",
        "lab-two-usual-2": "not finished",
        "lab-two-none-2": "not begun",
    }
    found = {
        (row["policy"], row["measure"]): row["value"]
        for row in rows
        if row["run"] == "lab-two-usual-1"
    }
    assert found["base", "total"] == 2.4
    assert found["iter01", "total"] == pytest.approx(2.8)
    assert found["iter01", "rank_correlation"] == 0.25
    assert ("iter00", "rank_correlation") not in found
    assert ("results/other/iter01", "total") not in found
    finished = next(row for row in rows if row["run"] == "lab-two-usual-1")
    assert finished["command"] == "snakemake ..."
    assert 60 <= finished["run_seconds"] < 120
    assert "cores" in finished["machine"]
    csv = pyarrow.csv.read_csv(args.csv).to_pylist()
    assert [row["run"] for row in csv] == [row["run"] for row in rows]


def test_the_page_judges_by_seeds_that_have_both_arms(args: summarise_laboratory.Args) -> None:
    summarise_laboratory.main(args)
    text = args.page.read_text()
    assert "| The usual is better | too few seeds |" in text
    assert "total | usual/last | none/last | +0.200 [+0.200, +0.200] | 1 | +0.200 |" in text
    assert "2 finished, 1 not finished, 1 not begun." in text
    assert "Not finished: lab-two-usual-2." in text
    [link] = re.findall(r"!\[[^]]+\]\((.+)\)", text)
    drawn = (args.page.parent / link).read_text()
    assert all(f">{word}<" in drawn for word in ("usual", "none", "base", "iter01"))
    assert "rank correlation with the truth" in drawn


def test_a_record_that_cannot_be_read_is_named(args: summarise_laboratory.Args) -> None:
    record = args.lab / "runs" / "lab-two-usual-1.json"
    assert json.loads(record.read_text())["run"] == "lab-two-usual-1"
    record.write_text("{")
    with pytest.raises(UserError, match=r"lab-two-usual-1.json is no record of a run"):
        summarise_laboratory.main(args)


def test_what_was_measured_before_is_in_the_table_and_is_kept_with_what_is_new(
    args: summarise_laboratory.Args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summarise_laboratory.main(replace(args, memory=args.lab / "measured.jsonl"))
    usual, none = (args.lab / "measured.jsonl").read_text().splitlines()
    assert '"total": 2.8' in usual
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    Path("earlier.jsonl").write_text(none.replace('"total": 2.6', '"total": 2.7') + "\n")
    finish(elsewhere, "lab-two-usual-2", 0.3)
    lab = Path("results/lab")
    second = replace(
        args, lab=lab, results=Path("results"), output=lab / "results.parquet",
        earlier=Path("earlier.jsonl"), memory=lab / "measured.jsonl",
    )  # fmt: skip
    summarise_laboratory.main(second)
    rows = {(row["run"], row["policy"], row["measure"]): row for row in read_rows(second.output)}
    assert rows["lab-two-none-1", "iter01", "total"]["value"] == pytest.approx(2.7)
    assert rows["lab-two-none-1", "iter01", "total"]["status"] == "finished"
    assert rows["lab-two-usual-2", "iter01", "total"]["value"] == pytest.approx(2.8)
    assert rows["lab-two-usual-1", None, None]["status"] == "not begun"
    assert len((lab / "measured.jsonl").read_text().splitlines()) == 2
