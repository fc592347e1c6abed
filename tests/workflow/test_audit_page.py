"""Every block of docs/audit.md runs as it is written on a finished run, and finds what the tables hold."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.workflow.projects import ROOT, Project

pytestmark = pytest.mark.xdist_group("finished")  # one process makes its run for all

PAGE = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(?:^    .*\n|^\n(?=    ))+", flags=re.MULTILINE)


def blocks() -> list[str]:
    """The page's Python, the command lines at its head left out."""
    found = [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in BLOCK.findall(PAGE)]
    return [block for block in found if "python -m" not in block]


@pytest.mark.slow
def test_every_block_of_the_page_runs_and_tells_the_truth(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (tmp_path / "results").mkdir()
    os.symlink(finished.results, tmp_path / "results" / "shapes")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    assert len(blocks()) > 12
    for block in blocks():
        capsys.readouterr()
        exec(compile(block, "docs/audit.md", "exec"), found)
        assert "print" not in block or capsys.readouterr().out.strip(), block
    results = finished.results
    mixed = pq.read_table(results / "iter01/preferences.parquet").to_pylist()
    human = [row for row in mixed if row["source"] == "human"]
    assert found["mix"].set_index("source").pairs.to_dict() == {
        "generated": len(mixed) - len(human), "human": len(human),
    }  # fmt: skip
    assert set(found["human"].pair_id) == {row["pair_id"] for row in human}
    seed = {
        row["pair_id"] for row in pq.read_table(results / "seed/preferences.parquet").to_pylist()
    }
    used = {
        row["pair_id"]
        for path in results.glob("iter*/preferences.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    assert set(found["unused"].pair_id) == seed - used
    sure = found["pairs"].in_standard_errors
    assert sure.is_monotonic_increasing
    assert len(sure) == len(pq.read_table(results / "iter01/pairs.parquet"))
    # the images of a prompt, best first, and the mean and its error of one of them
    assert found["candidates"].reward.is_monotonic_decreasing
    assert len(list(tmp_path.glob("candidate-*.png"))) == len(found["candidates"]) == 3
    judged = [
        row
        for path in results.glob("iter01/scores/*.parquet")
        for row in pq.read_table(path).to_pylist()
        if row["prompt_id"] == found["prompt_id"] and row["candidate"] == 0
    ]
    assert found["draws"].gain.mean() == pytest.approx(judged[0]["reward"], rel=1e-4)
    assert found["draws"].gain.sem() == pytest.approx(judged[0]["standard_error"], rel=1e-3)
    wrong = [
        (path.stem, row["pair_id"])
        for path in results.glob("evaluation/holdout/*.parquet")
        for row in pq.read_table(path).to_pylist()
        if row["probability"] < 0.5
    ]
    assert sorted(zip(found["wrong"].policy, found["wrong"].pair_id, strict=True)) == sorted(wrong)
    summary = pq.read_table(results / "evaluation/summary.parquet").to_pylist()
    [row] = [r for r in summary
             if (r["metric"], r["policy"], r["baseline"]) == ("total", "iter01", "base")]  # fmt: skip
    assert found["gain"].gain.mean() == pytest.approx(row["difference"], rel=1e-6)
    assert not found["gain"].prompt.isna().any()
    assert len(found["agreement"]) == 4
    assert np.isfinite(found["agreement"].correlation).any()
    policies = {
        row["policy_digest"] for row in pq.read_table(results / "iter01/pairs.parquet").to_pylist()
    }
    assert set(found["made"][found["made"].iteration == 1].policy_digest) == policies
    facts = found["lineage"].set_index("name").value
    assert facts["sail_stage"] == "select_pairs"
    assert "candidates/shard-0.parquet" in facts["sail_inputs"]
    assert isinstance(found["tables"], pd.DataFrame)
    assert dict(zip(found["tables"].table, found["tables"].rows, strict=True)) == {
        str(path.relative_to(results)): pq.read_metadata(path).num_rows
        for path in results.rglob("*.parquet")
    }
