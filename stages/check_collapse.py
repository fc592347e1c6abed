"""The guards of one iteration in; whether the run goes on, and from which policy, out.

Only with guards.on_collapse stop or rollback. Paper: SAIL Sec. 5.5 shows what collapses. Example:
paste the line from logs/<run>/iter01/check_collapse.log
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from stages.core.artifacts.provenance import write_record
from stages.core.evaluation.gates import OnCollapse, decide, facts_of, read_gate
from stages.core.evaluation.guard_tables import Evidence, GuardTables
from stages.core.evaluation.guards import GUARDS, Limits, blindness_warning, measured, warnings_of
from stages.core.execution.runtime import log, run_stage, stage


@dataclass(frozen=True, kw_only=True)
class Args:
    """The guards of one iteration in; whether the run goes on, and from which policy, out."""

    iteration: int
    """The iteration that is judged."""
    on_collapse: OnCollapse
    """What follows if a guard is beyond its threshold."""
    limits: Limits
    """The thresholds."""
    holdout: tuple[tuple[int, Path], ...]
    """Iteration and held-out pairs as its policy judges them, of this and of 0 (holdout_rewards)."""
    diversity: tuple[tuple[int, Path], ...]
    """Iteration and how far its policy's images differ, of this and of 0 (schema diversity)."""
    pairs: tuple[tuple[int, Path], ...] = ()
    """Iteration and the pairs that it made, if it is above 0 (schema training_pairs)."""
    previous: Path | None = None
    """The gate of the iteration before, if it is above 0."""
    output: Path
    """Where the decision goes (JSON)."""


def main(args: Args) -> None:
    """Judge this iteration by the thresholds that the report warns by."""
    with stage("check_collapse") as run:
        tables = GuardTables(
            holdout=dict(args.holdout), diversity=dict(args.diversity), pairs=dict(args.pairs)
        )
        guards = [guard for guard in GUARDS if guard.tells_of_collapse]
        seed, row = (measured(Evidence(tables, number), guards) for number in (0, args.iteration))
        if blindness := blindness_warning((seed, row)):
            log.warning("%s", blindness)
        previous = None if args.previous is None else read_gate(args.previous)
        findings = warnings_of(row, seed, args.limits, guards)
        gate = decide(row, findings, asdict(args.limits), args.on_collapse, previous)
        for finding in gate.findings:
            log.warning("collapse: %s", finding)
        log.info(
            "gate after iteration %d: %s; the last good policy is %s",
            gate.iteration, f"go on from {gate.go_on_from}" if gate.go_on_from else "stop",
            gate.last_good,
        )  # fmt: skip
        inputs = [path for _, path in (*args.holdout, *args.diversity, *args.pairs)]
        if args.previous is not None:
            inputs.append(args.previous)
        write_record(
            args.output, facts_of(gate), stage="check_collapse", arguments=args, inputs=inputs
        )
        run.rows_in, run.rows_out = len(inputs), 1


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
