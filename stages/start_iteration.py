"""The gate of the iteration before in; the policy that this iteration starts from out, or an end.

Only with guards.on_collapse stop or rollback. Example: paste the line from
logs/<run>/iter02/start_iteration.log
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from stages.core.artifacts.provenance import policy_digest, write_manifest
from stages.core.errors import UserError
from stages.core.evaluation.gates import Gate, read_gate, why_stopped
from stages.core.execution.runtime import log, run_stage, stage
from stages.core.export.folders import link_or_copy


@dataclass(frozen=True, kw_only=True)
class Args:
    """The gate of the iteration before in; the policy that this iteration starts from out."""

    gate: Path
    """What the guards decided after the iteration before (JSON)."""
    policies: tuple[Path, ...]
    """Policy folders of the iterations so far, results/<run>/iterNN/policy."""
    output: Path
    """Policy folder to write: the same files, linked, and a manifest that says whose they are."""


def main(args: Args) -> None:
    """Hand on the policy that the gate names. UserError where it ends the run."""
    with stage("start_iteration") as run:
        gate = read_gate(args.gate)
        if gate.stops:
            raise UserError(why_stopped(gate))
        source = chosen(gate, args)
        hand_on(source, gate, args)
        log.info("start_iteration: goes on from %s", source)
        run.rows_in, run.rows_out = len(args.policies), 1


def chosen(gate: Gate, args: Args) -> Path:
    """The folder of the policy that the gate names."""
    by_name = {path.parent.name: path for path in args.policies}
    if gate.go_on_from not in by_name:
        raise UserError(
            f"{args.gate} goes on from {gate.go_on_from!r}; --policies names "
            f"{', '.join(by_name) or 'none'}. Give the folder of that policy too."
        )
    return by_name[gate.go_on_from]


def hand_on(source: Path, gate: Gate, args: Args) -> None:
    """The source's files in another folder, linked where that can be, with a manifest of its own."""
    policy_digest(source)
    manifest = source / "manifest.json"
    known: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    shutil.rmtree(args.output, ignore_errors=True)
    for name in known["files"]:
        (args.output / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source / name, args.output / name)
    facts: dict[str, Any] = {key: known[key] for key in ("base", "kind") if key in known}
    facts |= {"handed_on": gate.go_on_from, "set_aside": list(gate.findings)}
    write_manifest(
        args.output, stage="start_iteration", arguments=args, inputs=[manifest], facts=facts
    )


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
