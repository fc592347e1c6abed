"""The smallest DAG, run once for all tests of the workflow."""

from __future__ import annotations

import pytest

from tests.workflow.projects import Project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The smallest DAG after an unbroken run. Tests that change something take a copy."""
    project = Project(tmp_path_factory.mktemp("finished"))
    project.make("--quiet", "all")
    return project
