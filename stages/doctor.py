r"""A folder where SAIL runs in; out: what is wrong with it, and the command that puts it right.

Looks at the installation, at running and left-behind stages, at locks, at free disk, and reads every
table and policy of the results to its end, against the digests of what it was made from. Changes
nothing. Ends with exit code 1 if there is a problem. Example:
    python -m stages.doctor
    python -m stages.doctor --results results/shapes
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from stages.core.execution.devices import lock_folder
from stages.core.execution.runtime import progress, run_stage, set_up_log
from stages.core.health.files import (
    artifacts,
    check_artifact,
    check_disk,
    check_leftovers,
    check_policies,
)
from stages.core.health.findings import Finding
from stages.core.health.installation import check_installation
from stages.core.health.jobs import check_locks, check_snakemake_lock, check_stages

MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """A folder where SAIL runs in; what is wrong with it out."""

    folder: Path = Path()
    """Where snakemake is called."""
    results: Path = Path("results")
    """Results to read, all runs or one; in that folder."""


def main(args: Args) -> None:
    """Look at everything, then print it with the one command to type."""
    set_up_log()
    findings = list(examine(args))
    show(findings)
    if any(finding.level == "problem" for finding in findings):
        raise SystemExit(1)


def examine(args: Args) -> Iterator[Finding]:
    """Everything that is looked at."""
    yield from check_installation()
    yield from check_snakemake_lock(args.folder)
    yield from check_stages(args.folder)
    yield from check_locks(lock_folder({}).rglob("[!q]*.lock"), "GPU")
    yield from check_locks((args.folder / "work").glob("*/*.lock"), "the training of")
    results = args.folder / args.results
    yield from check_disk(results)
    if not results.is_dir():
        yield Finding(level="note", what=f"{results} is not there: nothing has been run yet",
                      remedy="snakemake --cores all")  # fmt: skip
        return
    yield from check_policies(results)
    yield from check_leftovers(results)
    paths = artifacts(results)
    found = [f for path in progress(paths, "reading results", "files")
             for f in check_artifact(path, args.folder)]  # fmt: skip
    yield from found
    if not found:
        yield Finding(level="ok", what=f"{len(paths)} tables and policies are whole and in step")


def show(findings: list[Finding]) -> None:
    """A table of what was found, and the one command that comes first."""
    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        table.add_row(MARKS[finding.level], _escaped(finding.what))
    console.print(table)
    for level in ("problem", "note"):
        wanted = [f.remedy for f in findings if f.level == level and f.remedy]
        if wanted:
            console.print(f"\nType: [bold]{_escaped(wanted[0])}[/]")
            if len(set(wanted)) > 1:
                console.print(f"then look again: {len(set(wanted)) - 1} more to do")
            return
    console.print("\nNothing to do. Type: [bold]snakemake --cores all[/]")


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


if __name__ == "__main__":
    logging.captureWarnings(True)
    run_stage(main, tyro.cli(Args, description=__doc__))
