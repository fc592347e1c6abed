"""How an artifact was made, what names it, and the manifest of a policy folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from stages.core.artifacts.files import write_json
from stages.core.artifacts.fingerprint import code_version
from stages.core.errors import UserError

BASE = "base"
"""How flags name the untouched base model where a policy folder could stand."""


class ArtifactError(UserError):
    """An artifact that is missing or not what it should be; the message says what to do."""


def write_manifest(
    folder: Path, *, stage: str, arguments: object, inputs: Sequence[Path], facts: Mapping[str, Any]
) -> Path:
    """Complete a policy folder: its files with digests, and how they were made. Written last."""
    files = {
        str(file.relative_to(folder)): digest(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "manifest.json" and not file.name.endswith(".part")
    }
    path = folder / "manifest.json"
    write_record(path, {"files": files, **facts}, stage=stage, arguments=arguments, inputs=inputs)
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished policy's manifest says."""
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def write_record(
    path: Path, facts: Mapping[str, Any], *, stage: str, arguments: object, inputs: Sequence[Path]
) -> None:
    """Write facts as a JSON file, with how they were made."""
    record = {**facts, **provenance(stage, arguments, inputs)}
    write_json(path, {key: maybe_json(value) for key, value in record.items()})


def policy_digest(folder: Path) -> str:
    """What names a policy's weights. ArtifactError unless the folder is complete and undamaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no finished policy: it has no manifest.json. Run the stage that trains "
            "it to its end (snakemake continues an interrupted training)."
        )
    try:
        files: dict[str, str] = dict(json.loads(path.read_text())["files"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is no readable manifest ({error}). Delete it and run snakemake again."
        ) from error
    for name, expected in files.items():
        file = folder / name
        if not is_inside(name) or not isinstance(expected, str):
            raise ArtifactError(
                f"{path} lists {name!r}: {expected!r}; expected names of files below {folder} with "
                "their sha256. Delete it and run snakemake again."
            )
        if not file.is_file() or digest(file) != expected:
            raise ArtifactError(
                f"{file} is missing or is not what manifest.json lists (expected sha256 "
                f"{expected[:12]}...). Delete {path} and run snakemake again."
            )
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, by its name alone."""
    path = PurePosixPath(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    )


def policy_name(policy: str) -> str:
    """A digest of a policy folder's weights, or 'base'."""
    return BASE if policy == BASE else policy_digest(Path(policy))


def policy_files(policy: str) -> list[Path]:
    """The file that stands for a policy among an artifact's inputs."""
    return [] if policy == BASE else [Path(policy) / "manifest.json"]


def provenance(stage: str, arguments: object, inputs: Sequence[Path]) -> dict[str, str]:
    """How an artifact is made, as metadata: every value is text, most of it JSON."""
    values = (
        asdict(arguments)
        if is_dataclass(arguments) and not isinstance(arguments, type)
        else arguments
    )
    return {
        "sail_stage": stage,
        "sail_code": code_version(f"stages.{stage}"),
        "sail_arguments": json.dumps(values, sort_keys=True, default=str),
        "sail_inputs": json.dumps({str(path): digest(path) for path in inputs}, sort_keys=True),
    }


def digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; run the stage that writes it first")
    facts = path.stat()
    return _digest(path.resolve(), facts.st_size, facts.st_mtime_ns, facts.st_ino)


@lru_cache(maxsize=4096)
def _digest(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    """Read once for all tables that a stage makes of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def maybe_json(value: Any) -> Any:
    """A value of the metadata: read where it is a block or a list in JSON, else as it is."""
    # Only blocks and lists: a code version such as 12e3 would be read as a number.
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
