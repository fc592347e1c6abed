"""The stages' code digests, kept from one Snakemake to the next beside Python's own compiled files.

To work them all out takes two seconds, to see that no byte of the code has changed a hundredth of one.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from stages.core.artifacts import fingerprint


def kept_version(module: str) -> str:
    """`fingerprint.code_version` of a stage's module; it is worked out once for each state of the code."""
    known = _read()
    if module not in known:
        known[module] = fingerprint.code_version(module)
        if source_digest() == _source():  # nobody has edited it meanwhile
            _keep(known)
    return known[module]


def source_digest() -> str:
    """A digest of every byte that a code digest may depend on: modules, and what lies beside them."""
    found = hashlib.sha256()
    package = fingerprint.ROOT / "stages"
    for folder in sorted({path.parent for path in package.rglob("*.py")}):
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            data = path.read_bytes()
            found.update(f"{path.relative_to(package).as_posix()} {len(data)}\n".encode())
            found.update(data)
    return found.hexdigest()


def kept_file() -> Path:
    """Where the digests lie."""
    return fingerprint.ROOT / "stages" / "__pycache__" / "code_versions.json"


@cache
def _source() -> str:
    """What it was when this process first asked."""
    return source_digest()


@cache
def _read() -> dict[str, str]:
    """The digests of this very code, none if there are only those of another, or something else."""
    source = _source()
    with suppress(OSError, ValueError):
        kept = json.loads(kept_file().read_text(encoding="utf-8"))
        if isinstance(kept, dict) and kept.get("source") == source:
            return dict(kept["versions"])
    return {}


def _keep(versions: dict[str, str]) -> None:
    """A Snakemake that reads meanwhile finds the old file or the new one; where none can be written there is none."""
    part = kept_file().with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        part.parent.mkdir(exist_ok=True)
        part.write_text(json.dumps({"source": _source(), "versions": versions}), encoding="utf-8")
        part.replace(kept_file())
