"""What the runs on clusters have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.core.artifacts.provenance import digest, policy_digest
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
    """All rows of all tables of a run, but not of those that sum up all iterations.

    Without speeds, and without digests of policies, which the base model's path is part of.
    """
    return {
        str(path.relative_to(project.results)): [
            {k: v for k, v in row.items() if k not in ("pairs_per_second", "policy_digest")}
            for row in read_rows(path)
        ]
        for path in sorted(project.results.rglob("*.parquet"))
        if path.parent.name != "evaluation"
    }


def weights(policy: Path) -> str:
    """The digest of a policy's weights; the policy must be whole."""
    policy_digest(policy)
    return digest(policy / "unet" / "diffusion_pytorch_model.safetensors")
