"""What the guards decide after an iteration: go on, stop the run, or go on from an earlier policy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stages.core.artifacts.provenance import BASE
from stages.core.errors import UserError

OnCollapse = Literal["stop", "rollback"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The decision after one iteration."""

    iteration: int
    policy: str
    """The policy it left."""
    on_collapse: OnCollapse
    findings: tuple[str, ...]
    """What is beyond its threshold, in words; empty where nothing is."""
    last_good: str
    """The policy that was found good last, this one included; 'base' if none was."""
    go_on_from: str
    """The policy that the next iteration starts from; empty if there shall be none."""
    limits: Mapping[str, Any]
    """The thresholds it was judged by."""

    @property
    def is_collapsed(self) -> bool:
        """Whether a guard is beyond its threshold."""
        return bool(self.findings)

    @property
    def stops(self) -> bool:
        """Whether the run ends here."""
        return not self.go_on_from


def decide(
    row: Mapping[str, Any],
    findings: Sequence[str],
    limits: Mapping[str, Any],
    on_collapse: OnCollapse,
    previous: Gate | None,
) -> Gate:
    """The gate after a guards row's iteration, by what was found beyond the limits there.

    `previous` is the gate of the iteration before. A collapsed iteration 0 has no policy before it
    to go back to, so it ends the run either way.
    """
    last_good = row["policy"] if not findings else previous.last_good if previous else BASE
    stops = bool(findings) and (on_collapse == "stop" or last_good == BASE)
    return Gate(
        iteration=row["iteration"],
        policy=row["policy"],
        on_collapse=on_collapse,
        findings=tuple(findings),
        last_good=last_good,
        go_on_from="" if stops else last_good,
        limits=limits,
    )


def facts_of(gate: Gate) -> dict[str, Any]:
    """The record of a gate, as it is written."""
    return {**asdict(gate), "is_collapsed": gate.is_collapsed}


def read_gate(path: Path) -> Gate:
    """The record of a gate. UserError names one that is missing or is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        values = {name: found[name] for name in Gate.__dataclass_fields__}
        return Gate(**{**values, "findings": tuple(values["findings"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no record of a gate ({error!r}); delete it and run snakemake again"
        ) from error


def stopped_after(
    folder: Path, iterations: int, on_collapse: str, limits: Mapping[str, Any]
) -> Gate | None:
    """The gate that ended a run in its results' folder, if one did by these thresholds."""
    if on_collapse == "warn":
        return None
    for number in range(iterations + 1):
        path = folder / f"iter{number:02d}" / "gate.json"
        if not path.is_file():
            return None
        gate = read_gate(path)
        if gate.on_collapse != on_collapse or gate.limits != limits:
            return None
        if gate.stops:
            return gate
    return None


def why_stopped(gate: Gate) -> str:
    """For the terminal, when the iteration after a gate is asked for."""
    lines = "".join(f"\n  - {finding}" for finding in gate.findings)
    return (
        f"the run ends after iteration {gate.iteration}, as guards.on_collapse is "
        f"{gate.on_collapse!r}{no_way_back(gate)}:{lines}\n"
        f"The last good policy is {gate.last_good}; all that was made is kept. Call snakemake again "
        "for the evaluation and the report of the iterations there are. To go on instead, set the "
        "threshold (block guards) so that it allows what was found, and call snakemake again; or "
        "train more gently (update_policy.learning_rate, passes) under a new name (run)."
    )


def no_way_back(gate: Gate) -> str:
    """Why a rollback ends a run."""
    return " and no policy before was good" if gate.on_collapse == "rollback" else ""


def left_out(gate: Gate, iterations: int) -> str:
    """For the terminal, when a stopped run is planned."""
    return (
        f"The run was stopped after iteration {gate.iteration} of {iterations} by its guards; later "
        f"iterations are left out: {' '.join(gate.findings)}"
    )


def last_good(gates: Sequence[Gate]) -> str | None:
    """The policy to use, by the gates of all iterations in their order; None without gates."""
    return gates[-1].last_good if gates else None


def gate_sentences(gates: Iterable[Gate], iterations: int) -> list[str]:
    """What a report says happened at the gates; `iterations` were asked for. Empty without gates."""
    sentences = []
    for gate in gates:
        if not gate.is_collapsed:
            continue
        found = " ".join(gate.findings)
        if gate.stops:
            rest = iterations - gate.iteration
            made = f"{rest} of {iterations} iterations were not made" if rest else "it was the last"
            sentences.append(
                f"The run was stopped after iteration {gate.iteration} "
                f"(guards.on_collapse: {gate.on_collapse}{no_way_back(gate)}); {made}. {found}"
            )
        else:
            then = f"iteration {gate.iteration + 1} went on from {gate.go_on_from}"
            if gate.iteration == iterations:
                then = f"the policy to use is {gate.go_on_from}"
            sentences.append(
                f"{gate.policy} was set aside (guards.on_collapse: rollback); {then}. {found}"
            )
    return sentences
