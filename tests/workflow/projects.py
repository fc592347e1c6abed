"""Snakemake calls as a user makes them, on the smallest config, in folders of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from stages.core.plan.configuration import merged
from tests.workflow.warm import warm_python

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config" / "config.yaml"
SMALLEST = Path(__file__).with_name("smallest.yaml")
RUN = "test"


@dataclass(frozen=True)
class Project:
    """A working directory that Snakemake runs in; the code stays where it is."""

    folder: Path
    root: Path = ROOT
    """Where the code lies."""

    @property
    def results(self) -> Path:
        """What the run has made."""
        return self.folder / "results" / RUN

    @property
    def logs(self) -> Path:
        """Its logs."""
        return self.folder / "logs" / RUN

    def arguments(self, *flags: str, config: Mapping[str, Any] | None = None) -> list[str]:
        """What follows `snakemake`, with `config` laid over the smallest one; None removes a block."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(whole_config(config or {})))
        return [
            *("--snakefile", str(self.root / "Snakefile")),
            *("--directory", str(self.folder), "--cores", "2"),
            *("--workflow-profile", str(self.root / "profiles" / "default")),
            *("--configfile", str(path)),
            *flags,
        ]

    def command(self, *flags: str, config: Mapping[str, Any] | None = None) -> list[str]:
        """A Snakemake call on the smallest config, with `config` laid over it.

        Its stages start warm, as they do where there is no graphics card, and a single one too.
        """
        changed = merged({"execution": {"warm_start": True}}, config or {})
        return [sys.executable, "-m", "snakemake", *self.arguments(*flags, config=changed)]

    def call(
        self, *flags: str, config: Mapping[str, Any] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Snakemake to its end, its stages and itself warm; what it printed is in stdout.

        They are forks of the tests' own warm Python, which serves many calls, instead of the call's.
        """
        python = warm_python()
        changed = merged({"execution": {"warm_start": False}}, config or {})
        return subprocess.run(
            [str(python), "-m", "snakemake", *self.arguments(*flags, config=changed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(python),
            timeout=1400,
            check=False,
        )

    def make(self, *flags: str, config: Mapping[str, Any] | None = None) -> None:
        """Run Snakemake to its end; it must succeed."""
        done = self.call(*flags, config=config)
        assert done.returncode == 0, done.stdout

    def planned(self, *flags: str, config: Mapping[str, Any] | None = None) -> dict[str, int]:
        """How many jobs of each rule a call would run."""
        done = self.call("--dry-run", "--quiet", "rules", *flags, config=config)
        assert done.returncode == 0, done.stdout
        counts = re.findall(r"^([a-z_]+) +(\d+)$", done.stdout, flags=re.MULTILINE)
        return {rule: int(count) for rule, count in dict(counts).items() if rule != "total"}

    def copy(self, folder: Path) -> Project:
        """Another project in the same state, Snakemake's records included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return replace(self, folder=folder)


def whole_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest config with `config` laid over it; None removes a block."""
    below = {"run": RUN, "model": {"base": str(ROOT / "stages/shapes/pipeline")}}
    whole = yaml.safe_load(CONFIG.read_text())
    for layer in (yaml.safe_load(SMALLEST.read_text()), below, config):
        whole = merged(whole, layer)
    return {key: value for key, value in whole.items() if value is not None}


def environment(python: Path | None = None) -> dict[str, str]:
    """Where `python` is the one that runs the tests, as in an activated environment, or another."""
    places = [Path(sys.executable).parent, os.environ["PATH"]]
    if python is not None:
        places.insert(0, python.parent)
    return {**os.environ, "PATH": os.pathsep.join(map(str, places))}
