"""What a run was begun with: its data, so that its name is not used for other data, and its code."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DATA_KEYS = ("preferences.files", "model.base", "train_seed.policy")
"""Config keys of what a run is made from."""
PACKAGES = ("torch", "diffusers", "transformers", "snakemake")
"""Those whose versions are recorded."""
GIT_SECONDS = 10


def data_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `DATA_KEYS`; None where one is not set."""
    found: dict[str, Any] = {}
    for key in DATA_KEYS:
        value: Any = config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        found[key] = value
    return found


def record_run(folder: Path, config: Mapping[str, Any], home: Path) -> None:
    """Remember what this run is made from, and with the code at `home`, if the disk lets us."""
    path = record_of(folder, config["run"])
    record = {**data_of(config), "made_with": made_with(home)}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def made_with(home: Path) -> dict[str, Any]:
    """The commit of the code at `home`, None where it is not known, and the versions of packages."""
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"commit": _commit(home), "versions": versions}


def read_made_with(path: Path | None) -> dict[str, Any]:
    """What the record of the last call says of its code; nothing without a readable record."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["made_with"] if path else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def other_data(folder: Path, config: Mapping[str, Any]) -> Sequence[str]:
    """A sentence for each key by which an earlier call made this run from something else."""
    try:
        before = json.loads(record_of(folder, config["run"]).read_text(encoding="utf-8"))
        now = json.loads(json.dumps(data_of(config)))
        return [
            f"{key} was {_shown(before[key])}, now it is {_shown(now[key])}"
            for key in DATA_KEYS
            if before[key] != now[key]
        ]
    except (OSError, ValueError, KeyError, TypeError):  # no record, or one of another version
        return []


def record_of(folder: Path, run: str) -> Path:
    """Where the record of a run lies."""
    return folder / ".snakemake" / "runs" / f"{run}.json"


def _commit(home: Path) -> str | None:
    """The checked-out commit, with a word if files differ from it; None without git or a repository."""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(home), *words],
                capture_output=True,
                text=True,
                timeout=GIT_SECONDS,
                check=True,
            ).stdout.strip()
            for words in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head} with changes" if changes else head


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
