"""What the guards decide after an iteration, in every order that matters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from stages.core.artifacts.provenance import write_record
from stages.core.errors import UserError
from stages.core.evaluation.gates import (
    Gate,
    OnCollapse,
    decide,
    facts_of,
    gate_sentences,
    left_out,
    read_gate,
    stopped_after,
    why_stopped,
)
from stages.core.evaluation.guard import Measured
from stages.core.evaluation.guards import GUARDS, Limits, warnings_of

LIMITS = Limits(max_drift=0.1, max_confident_share=0.9)
SEED: Measured = {
    "iteration": 0,
    "policy": "iter00",
    "reward_accuracy": 0.7,
    "reward_accuracy_low": 0.6,
    "accuracy_change": None,
    "accuracy_change_p": None,
    "reward_accuracy_high": 0.8,
    "num_holdout_pairs": 200,
    "diversity": 0.2,
    "feature_diversity": 0.3,
    "features": "perceptual",
    "drift": 0.01,
    "blank_share": 0.0,
    "truncated_share": 0.5,
    "rank_correlation": None,
    "best_beats_worst": None,
    "confident_share": None,
}


def later(iteration: int, **changes: float) -> Measured:
    values = {"iteration": iteration, "policy": f"iter{iteration:02d}", "confident_share": 0.2}
    return SEED | values | changes


def chain(rows: list[Measured], on_collapse: OnCollapse) -> list[Gate]:
    gates: list[Gate] = []
    guards = [guard for guard in GUARDS if guard.tells_of_collapse]
    for row in rows:
        findings = warnings_of(row, rows[0], LIMITS, guards)
        previous = gates[-1] if gates else None
        gates.append(decide(row, findings, asdict(LIMITS), on_collapse, previous))
    return gates


def test_a_good_run_goes_on_from_each_policy_though_prompts_are_truncated() -> None:
    gates = chain([SEED, later(1), later(2)], "stop")
    assert [gate.go_on_from for gate in gates] == ["iter00", "iter01", "iter02"]
    assert not any(gate.findings for gate in gates)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_accuracy_low": 0.49}, "not clearly better than chance"),
        ({"confident_share": 0.95}, "95 % of the pairs of iteration 1"),
        ({"diversity": 0.1}, "50 % as much as those of iter00 (limit 60 %)"),
        (
            {"feature_diversity": 0.1},
            "by features (perceptual) its images of one prompt differ 33 %",
        ),
        ({"drift": 0.11}, "drifted 0.11 from base (limit 0.1)"),
        ({"blank_share": 0.02}, "2.0% of the images of iter01 are black"),
    ],
)
def test_each_guard_closes_the_gate_with_what_was_found_and_the_threshold(
    changes: dict[str, float], words: str
) -> None:
    gate = chain([SEED, later(1, **changes)], "stop")[1]
    assert gate.stops
    assert gate.last_good == "iter00"
    assert len(gate.findings) == 1
    assert words in gate.findings[0]
    assert words in why_stopped(gate)
    assert "after iteration 1" in why_stopped(gate)
    assert "block guards" in why_stopped(gate)


def test_a_rollback_goes_on_from_the_last_good_policy_however_often() -> None:
    bad = {"drift": 1.0}
    guards = [SEED, later(1), later(2, **bad), later(3, **bad), later(4)]
    gates = chain(guards, "rollback")
    assert [gate.go_on_from for gate in gates] == ["iter00", "iter01", "iter01", "iter01", "iter04"]
    assert [gate.last_good for gate in gates] == ["iter00", "iter01", "iter01", "iter01", "iter04"]
    said = gate_sentences(gates[:4], 3)
    assert said[0].startswith(
        "iter02 was set aside (guards.on_collapse: rollback); iteration 3 went"
    )
    assert "the policy to use is iter01" in said[1]


def test_a_collapsed_iteration_0_ends_the_run_either_way() -> None:
    for on_collapse in ("stop", "rollback"):
        (gate,) = chain([SEED | {"drift": 1.0}], on_collapse)  # type: ignore[arg-type]
        assert (gate.stops, gate.last_good) == (True, "base")
    assert "no policy before was good" in why_stopped(gate)


def write(folder: Path, gates: list[Gate]) -> None:
    for gate in gates:
        path = folder / gate.policy / "gate.json"
        write_record(path, facts_of(gate), stage="check_collapse", arguments={}, inputs=[])
        assert read_gate(path) == gate


def test_a_stopped_run_is_planned_up_to_its_gate(tmp_path: Path) -> None:
    limits = asdict(LIMITS)
    assert stopped_after(tmp_path, 3, "stop", limits) is None
    gates = chain([SEED, later(1, drift=1.0)], "stop")
    write(tmp_path, gates)
    found = stopped_after(tmp_path, 3, "stop", limits)
    assert found == gates[1]
    assert "stopped after iteration 1 of 3" in left_out(gates[1], 3)
    assert gate_sentences(gates, 3) == [
        "The run was stopped after iteration 1 (guards.on_collapse: stop); 2 of 3 iterations were "
        "not made. iter01 has drifted 1 from base (limit 0.1). Look at its images before you use it."
    ]
    assert "it was the last" in gate_sentences(gates, 1)[0]
    # other thresholds, or another choice, judge anew
    assert stopped_after(tmp_path, 3, "stop", {**limits, "max_drift": 2.0}) is None
    assert stopped_after(tmp_path, 3, "rollback", limits) is None
    assert stopped_after(tmp_path, 3, "warn", limits) is None
    assert stopped_after(tmp_path, 0, "stop", limits) is None


def test_what_is_no_gate_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gate.json"
    path.write_text('{"iteration": 1}')
    with pytest.raises(UserError, match="gate.json is no record of a gate .*'policy'.*delete it"):
        read_gate(path)
