"""A finished run of the laboratory in; by which command, code and machine it was made out.

Example: paste the line from logs/lab/<run>.log
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.artifacts.provenance import write_record
from stages.core.execution.run_record import made_with
from stages.core.execution.runtime import run_stage, stage


@dataclass(frozen=True, kw_only=True)
class Args:
    """A finished run of the laboratory in, by which command, code and machine it was made out."""

    run: str
    """Its name in results/."""
    command: str
    """What made it."""
    begun: int
    """When its last call began, in seconds since 1970."""
    output: Path
    """Where the record goes (JSON)."""


def main(args: Args) -> None:
    """Write down what the tables of the run do not say."""
    with stage("record_experiment") as run:
        made = made_with(Path(__file__).resolve().parents[1])
        facts = {
            "run": args.run,
            "command": args.command,
            "commit": made["commit"],
            "versions": made["versions"],
            "machine": machine_kind(),
            "run_seconds": max(0.0, time.time() - args.begun),
        }
        inputs = [Path("results") / args.run / "evaluation" / name
                  for name in ("summary.parquet", "guards.parquet")]  # fmt: skip
        write_record(args.output, facts, stage="record_experiment", arguments=args, inputs=inputs)
        run.rows_in = run.rows_out = 1


def machine_kind() -> str:
    """The kind of machine, without its name: processor, cores, system."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
