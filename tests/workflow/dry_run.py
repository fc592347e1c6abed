"""Plan configs whose data is not here: files of nothing but zeros stand where they look for it.

    python -m tests.workflow.dry_run config/*.yaml

Prints the number of jobs of each config and fails unless all plan some. Overlays are planned on top of
config/sd15.yaml.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from stages.core.plan.pool import MAX_BYTES
from tests.workflow.projects import ROOT, environment, merged
from tests.workflow.warm import warm_python

COUNT = re.compile(r"^([a-z_]+) +(\d+)$", flags=re.MULTILINE)


def named_files(config: Mapping[str, Any]) -> Iterator[str]:
    """The data files that a config reads; a pattern's first match."""
    yield from config["preferences"].get("files", [])
    if "pool" in config["prompts"]:
        pool = config["prompts"]["pool"]
        yield from [pool] if isinstance(pool, str) else pool
    sets = config["evaluation"].get("prompt_sets", {}).values()
    yield from (path for path in sets if path is not None)


def plan(configs: Sequence[Path]) -> dict[str, int]:
    """How many jobs of each rule the merged configs plan."""
    whole: dict[str, Any] = {}
    for path in configs:
        whole = merged(whole, yaml.safe_load(path.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        for name in named_files(whole):
            path = Path(folder) / name.replace("*", "00000")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(2 * MAX_BYTES)  # of a larger pool nobody counts the prompts
        python = warm_python()
        done = subprocess.run(
            [
                *(str(python), "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
                *("--directory", folder, "--dry-run", "--quiet", "rules"),
                *("--resources", "gpu=8", "--configfile", *map(str, configs)),
            ],
            capture_output=True, text=True, env=environment(python), check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{configs}: {done.stdout}{done.stderr}")
    counts = {rule: int(count) for rule, count in COUNT.findall(done.stdout)}
    counts.pop("total", None)
    return counts


def overlaid(path: Path) -> list[Path]:
    """The config files that a path stands for."""
    is_overlay = path.parent.name == "overlays"
    return [ROOT / "config" / "sd15.yaml", path.resolve()] if is_overlay else [path.resolve()]


if __name__ == "__main__":
    warm_python()
    with ThreadPoolExecutor(2) as pool:
        planned = pool.map(lambda name: plan(overlaid(Path(name))), sys.argv[1:])
        for name, counts in zip(sys.argv[1:], planned, strict=True):
            jobs = sum(counts.values())
            print(f"{name}: {jobs} jobs")
            if not jobs:
                sys.exit(f"{name} plans nothing")
