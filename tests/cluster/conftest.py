"""What the runs on clusters have in common."""

from __future__ import annotations

from typing import Any

import pytest

from tests.builders import read_rows
from tests.workflow.projects import ROOT, Project

Config = dict[str, Any]


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The smallest DAG without its second iteration, second metric and exports.

    The path of its base model is hostile to shells.
    """
    model = tmp_path_factory.mktemp("models") / 'it\'s $(touch pwned); `touch pwned` "1"'
    model.symlink_to(ROOT / "stages" / "shapes" / "pipeline")
    return {
        "iterations": 1,
        "prompts": {"per_iteration": [4]},
        "evaluation": {"metrics": ["total"]},
        "export": {"policies": []},
        "model": {"base": str(model)},
    }


def tables(project: Project) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables of a run, without speeds; not of those that sum up all iterations."""
    return {
        str(path.relative_to(project.results)): [
            {k: v for k, v in row.items() if k != "pairs_per_second"} for row in read_rows(path)
        ]
        for path in sorted(project.results.rglob("*.parquet"))
        if path.parent.name != "evaluation"
    }
