"""What data a run was begun with, so that its name is not used for other data unawares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

DATA_KEYS = ("preferences.files", "model.base", "train_seed.policy")
"""Config keys of what a run is made from."""


def data_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `DATA_KEYS`; None where one is not set."""
    found: dict[str, Any] = {}
    for key in DATA_KEYS:
        value: Any = config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        found[key] = value
    return found


def record_run(folder: Path, config: Mapping[str, Any]) -> None:
    """Remember what this run is made from, if the disk lets us."""
    path = _record(folder, config["run"])
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data_of(config), indent=2) + "\n", encoding="utf-8")


def other_data(folder: Path, config: Mapping[str, Any]) -> Sequence[str]:
    """A sentence for each key by which an earlier call made this run from something else."""
    try:
        before = json.loads(_record(folder, config["run"]).read_text(encoding="utf-8"))
        now = json.loads(json.dumps(data_of(config)))
        return [
            f"{key} was {_shown(before[key])}, now it is {_shown(now[key])}"
            for key in DATA_KEYS
            if before[key] != now[key]
        ]
    except (OSError, ValueError, KeyError, TypeError):  # no record, or one of another version
        return []


def _record(folder: Path, run: str) -> Path:
    return folder / ".snakemake" / "runs" / f"{run}.json"


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
