"""A local run that those on clusters must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.builders import read_rows
from tests.workflow.projects import ROOT, Project

Config = dict[str, Any]


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One iteration, one metric, no exports, and a base model whose path is hostile to shells."""
    model = tmp_path_factory.mktemp("models") / 'it\'s $(touch pwned); `touch pwned` "1"'
    model.symlink_to(ROOT / "stages" / "shapes" / "pipeline")
    return {
        "iterations": 1,
        "prompts": {"per_iteration": [4]},
        "evaluation": {"metrics": ["total"]},
        "export": {"policies": []},
        "model": {"base": str(model)},
    }


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Project:
    """The smallest DAG, run here."""
    project = Project(tmp_path_factory.mktemp("local"))
    project.make("--quiet", "all", config=config)
    return project


def tables(results: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables of a run, without speeds."""
    return {
        str(path.relative_to(results)): [
            {k: v for k, v in row.items() if k != "pairs_per_second"} for row in read_rows(path)
        ]
        for path in sorted(results.rglob("*.parquet"))
    }
