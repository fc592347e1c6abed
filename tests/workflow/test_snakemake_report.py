"""`snakemake --report` of a finished run holds its page and its tables, with captions and categories."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from tests.workflow.projects import Project

pytestmark = pytest.mark.xdist_group("finished")  # one process makes its run for all

SHOWN = {
    "Report": ("report.html", "config.json"),
    "Evaluation": (
        "evaluation/summary.parquet", "evaluation/breakdown.parquet", "evaluation/guards.parquet",
        "evaluation/reliability.parquet", "evaluation/leakage.parquet",
    ),
    "Human pairs": ("seed/import.json",),
}  # fmt: skip


@pytest.mark.slow
def test_the_zip_holds_the_results_byte_by_byte_with_captions(
    finished: Project, tmp_path: Path
) -> None:
    done = finished.call("--report", str(tmp_path / "run.zip"))
    assert done.returncode == 0, done.stdout
    assert "mimetype" not in done.stdout
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        kept = {Path(name).name: archive.read(name) for name in archive.namelist()}
        page = archive.read("run/report.html").decode()
        raw = {
            Path(name).name: archive.read(name)
            for name in archive.namelist()
            if "/data/raw/" in name
        }
    assert len(kept) >= len(raw)
    for category, names in SHOWN.items():
        assert f'"{category}"' in page
        for name in names:
            path = finished.results / name
            assert raw[path.name] == path.read_bytes(), name
    assert set(raw) == {Path(name).name for names in SHOWN.values() for name in names}
    words = re.sub(r"\s+", " ", page)
    for caption in (
        "Every policy against each earlier one and the base",
        "whether the policy is still a judge",
        "What was read of the human labels",
        "SAIL aligned a text-to-image model",
    ):
        assert caption in words
