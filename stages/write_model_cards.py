r"""Exported policies and the evaluation in; their model cards with metrics out.

Example:
    python -m stages.write_model_cards --exports results/shapes/export/iter03/diffusers iter03 \\
        --summary results/shapes/evaluation/summary.parquet
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from stages.core.artifacts.files import write_text
from stages.core.artifacts.schemas import SUMMARY
from stages.core.artifacts.tables import read_table
from stages.core.errors import UserError
from stages.core.evaluation.gates import read_gate
from stages.core.evaluation.guards import GUARDS_TABLE, Limits, seed_row, warnings_of
from stages.core.execution.runtime import run_stage, stage
from stages.core.export.cards import model_card
from stages.core.export.folders import CARD, MANIFEST


@dataclass(frozen=True, kw_only=True)
class Args:
    """Exported policies and the evaluation in; their model cards with metrics out."""

    exports: tuple[tuple[Path, str], ...]
    """Folder of each export, and how the summary names its policy."""
    summary: Path
    """Paired comparisons of all policies (schema evaluation_summary)."""
    guards: Path | None = None
    """Measures of each iteration (schema guards): the card says what they warn of."""
    limits: Limits = field(default_factory=Limits)
    """Where a guard becomes a warning."""
    gates: tuple[Path, ...] = ()
    """What the guards decided after each iteration (JSON); none with on_collapse warn."""


def main(args: Args) -> None:
    """Write each card again; the weights beside it stay as they are."""
    with stage("write_model_cards") as run:
        rows = read_table(args.summary, SUMMARY).to_pylist()
        set_aside = {gate.policy: gate.findings for gate in map(read_gate, args.gates)}
        warnings = warnings_by_policy(args)
        run.rows_in = len(rows)
        for folder, name in args.exports:
            path = folder / MANIFEST
            if not path.is_file():
                raise UserError(f"{folder} is no finished export: it has no manifest.json")
            facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
            facts["set_aside"] = set_aside.get(name, ())
            facts["warnings"] = warnings.get(name, ())
            own = [row for row in rows if row["policy"] == name]
            write_text(folder / CARD, model_card(facts, own))
            run.rows_out += len(own)


def warnings_by_policy(args: Args) -> dict[str, list[str]]:
    """What the guards warn of, policy by policy."""
    if args.guards is None:
        return {}
    rows = read_table(args.guards, GUARDS_TABLE).to_pylist()
    seed = seed_row(rows)
    return {row["policy"]: warnings_of(row, seed, args.limits) for row in rows}


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
