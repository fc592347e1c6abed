"""How a file was made, by its own record: the stage, its arguments, its code, the files it read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.artifacts.fingerprint import code_version
from stages.core.artifacts.provenance import digest


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The record of how a file was made."""

    stage: str
    code: str
    """Digest of the stage's code then."""
    arguments: Mapping[str, Any]
    inputs: Mapping[str, str]
    """sha256 of each file that it read."""


def lineage_of(record: Mapping[str, Any]) -> Lineage | None:
    """The lineage in a file's metadata, with or without the prefix `sail_`; None where it has none."""
    plain = {key.removeprefix("sail_"): value for key, value in record.items()}
    stage = plain.get("stage")
    if not isinstance(stage, str) or not stage:
        return None
    arguments, inputs = plain.get("arguments"), plain.get("inputs")
    return Lineage(
        stage=stage,
        code=str(plain.get("code", "")),
        arguments=arguments if isinstance(arguments, dict) else {},
        inputs=inputs if isinstance(inputs, dict) else {},
    )


def code_note(lineage: Lineage) -> str:
    """Whether the stage's code is what it was."""
    try:
        now = code_version(f"stages.{lineage.stage}")
    except (OSError, ImportError, SyntaxError, ValueError):
        return "there is no such stage any more"
    return "as it is now" if now == lineage.code else f"now {now}: it has changed since"


def input_states(lineage: Lineage, folder: Path, verify: bool) -> Iterator[tuple[str, str, str]]:
    """(path, short digest, state) of each file that was read; paths begin in `folder`.

    'there' or 'gone'; with `verify`, which reads the files, 'the same' or 'another now'.
    """
    for name, expected in lineage.inputs.items():
        path = folder / name
        if not path.is_file():
            state = "gone"
        elif not verify:
            state = "there"
        else:
            state = "the same" if digest(path) == expected else "another now"
        yield name, str(expected)[:12], state


def argument_lines(lineage: Lineage) -> Iterator[str]:
    """Each argument as 'name = value', without the files, which are told as inputs; nested names have dots."""
    for name, value in flat(lineage.arguments).items():
        text = value if isinstance(value, str) else json.dumps(value)
        if text in lineage.inputs or name.startswith("execution."):
            continue
        if isinstance(value, list) and value and all(str(item) in lineage.inputs for item in value):
            continue
        yield f"{name} = {text if len(text) <= 100 else text[:97] + '...'}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested blocks as one, the names joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found
