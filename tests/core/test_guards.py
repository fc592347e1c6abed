"""A guard is defined in one place; the table, the limits, the warnings and the page follow from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tyro

from stages.core.artifacts.provenance import write_record
from stages.core.artifacts.schemas import DIVERSITY, HOLDOUT_REWARDS, TRAINING_PAIRS, column
from stages.core.artifacts.tables import read_table, write_table
from stages.core.errors import UserError
from stages.core.evaluation.gates import decide, facts_of, read_gate
from stages.core.evaluation.guard import Guard, Limit, Measured
from stages.core.evaluation.guard_tables import Evidence, GuardTables, floats
from stages.core.evaluation.guards import (
    GUARDS,
    GUARDS_TABLE,
    Limits,
    all_warnings,
    guards_table,
    in_words,
    limits_of,
    measured,
    seed_row,
    warnings_of,
)
from stages.core.report.guard_rows import guards_view
from stages.core.report.page import render
from tests.builders import Row, image_value
from tests.security.test_pages import report_context


def certainty_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    if not row["certainty"] > limit:
        return None
    return (
        f"{row['policy']} is {row['certainty'] - seed['certainty']:.2f} surer than {seed['policy']}, "
        f"with {row['certainty']:.2f} (limit {limit})."
    )


PLANTED = Guard(
    columns=(
        column("certainty", pa.float64(), "mean of max(p, 1 - p) over held-out pairs"),
        column("least_certainty", pa.float64(), "the least of them"),
    ),
    title="Certainty",
    meaning="How sure the judge is of held-out pairs.",
    measure=lambda evidence: {
        "certainty": float(floats(evidence.held_out, "probability").mean()),
        "least_certainty": float(floats(evidence.held_out, "probability").min()),
    },
    limit=Limit(key="max_certainty", default=0.8, meaning="The judge is surer than this."),
    sentence=certainty_sentence,
    is_share=True,
    note=lambda row: f"at least {row['least_certainty']:.2f}",
)
WITH_PLANTED = (*GUARDS, PLANTED)


@pytest.fixture
def tables(tmp_path: Path) -> GuardTables:
    """Two iterations: the judge is 70 % sure of all held-out pairs, then 90 %."""
    paths: dict[str, dict[int, Path]] = {"holdout": {}, "diversity": {}, "pairs": {}}

    def write(kind: str, iteration: int, rows: list[Row], schema: Any) -> None:
        paths[kind][iteration] = tmp_path / f"{kind}{iteration}.parquet"
        write_table(paths[kind][iteration], rows, schema, stage="score_holdout", arguments={})

    for iteration, sure in enumerate((0.7, 0.9)):
        judged: Row = {
            "winner_reward": 1.0,
            "loser_reward": 0.0,
            "probability": sure,
            "drift": 0.01,
        }
        judged |= {f"{side}_{whose}_errors": [] for side in ("winner", "loser")
                   for whose in ("policy", "reference")}  # fmt: skip
        judged |= {"timesteps": [], "num_timesteps": 1000}
        rows = [
            {"pair_id": str(number), "prompt_id": str(number), **judged} for number in range(20)
        ]
        write("holdout", iteration, rows, HOLDOUT_REWARDS)
        drawn = {"num_images": 2, "num_blank": 0, "pixel_distance": 0.2, "feature_distance": 9.0}
        moved = (0.002, 0.09) if iteration == 0 else (0.002, 0.5)
        drawn |= dict(zip(("moved_pixels", "moved_features"), moved, strict=True))
        row = {"prompt_id": "a", "features": "perceptual", **drawn}
        write("diversity", iteration, [row], DIVERSITY)
    latents = {f"{side}_latents": [0.0] for side in ("winner", "loser")}
    geometry = {f"{side}_geometry": [64, 64, 0, 0, 64, 64] for side in ("winner", "loser")}
    pair = {"pair_id": "p", "prompt_id": "a", "prompt": "a", "source": "generated", "iteration": 1}
    image = image_value(b"")
    pair |= {
        "winner": image,
        "loser": image,
        "probability": 0.95,
        "winner_candidate": 0,
        "loser_candidate": 1,
        **latents,
        **geometry,
    }
    write("pairs", 1, [pair], TRAINING_PAIRS)
    return GuardTables(**paths, truncated_share=0.0)


@pytest.fixture
def rows(tables: GuardTables) -> list[Measured]:
    return [measured(Evidence(tables, number), WITH_PLANTED) for number in (0, 1)]


def test_a_planted_guard_is_in_the_schema_and_in_the_table(
    rows: list[Measured], tmp_path: Path
) -> None:
    schema = guards_table(WITH_PLANTED)
    assert set(schema.arrow.names) - set(GUARDS_TABLE.arrow.names) == {
        "certainty",
        "least_certainty",
    }
    path = tmp_path / "guards.parquet"
    write_table(path, rows, schema, stage="summarise_guards", arguments={})
    found = read_table(path, schema)
    assert found.schema.field("certainty").metadata == PLANTED.columns[0].metadata
    np.testing.assert_allclose(found.column("certainty").to_numpy(), (0.7, 0.9), rtol=1e-6)
    assert found.column("confident_share").to_pylist() == [None, 1.0]


def test_a_planted_guards_limit_is_a_flag_with_its_default_and_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits = limits_of(WITH_PLANTED)
    assert asdict(limits()) == asdict(Limits()) | {"max_certainty": 0.8}
    assert tyro.cli(limits, args=["--max-certainty", "0.6"]).max_certainty == 0.6
    with pytest.raises(SystemExit):
        tyro.cli(limits, args=["--help"])
    assert "The judge is surer than this. (default: 0.8)" in capsys.readouterr().out


def test_a_planted_guard_warns_closes_the_gate_and_stands_in_the_log(
    rows: list[Measured], tmp_path: Path
) -> None:
    limits = limits_of(WITH_PLANTED)(max_confident_share=1.0, min_moved_share=0.0)
    sentence = "iter01 is 0.20 surer than iter00, with 0.90 (limit 0.8)."
    assert all_warnings(rows, limits, WITH_PLANTED) == [sentence]
    assert (
        all_warnings(
            rows,
            limits_of(WITH_PLANTED)(
                max_certainty=0.95, max_confident_share=1.0, min_moved_share=0.0
            ),
            WITH_PLANTED,
        )
        == []
    )
    findings = warnings_of(rows[1], rows[0], limits, WITH_PLANTED)
    gate = decide(rows[1], findings, asdict(limits), "stop", None)
    path = tmp_path / "gate.json"
    write_record(path, facts_of(gate), stage="check_collapse", arguments={}, inputs=[])
    assert read_gate(path).findings == (sentence,)
    assert read_gate(path).limits["max_certainty"] == 0.8
    assert in_words(rows[1], WITH_PLANTED).endswith(", Certainty 90 % (at least 0.90)")


def test_a_planted_guard_stands_on_the_page(rows: list[Measured]) -> None:
    view = guards_view(rows, limits_of(WITH_PLANTED)(), WITH_PLANTED)
    page = render(report_context(["text"]) | view)
    assert '<th scope="row">Certainty<svg' in page
    assert "How sure the judge is of held-out pairs." in page
    assert "at least 0.90" in page
    assert 'aria-label="Certainty: 0 70 %, 1 90 %"' in page
    assert "iter01 is 0.20 surer than iter00" in page
    cells = view["guards"][-1]["cells"]
    assert [(cell["text"], cell["turned"]) for cell in cells] == [("70 %", False), ("90 %", True)]


def test_every_limit_has_one_default_and_every_column_one_guard() -> None:
    limits = [guard.limit for guard in GUARDS if guard.limit]
    assert {limit.key: limit.default for limit in limits} == asdict(Limits())
    assert len(set(limits)) == len({limit.key for limit in limits})
    columns = [own.name for guard in GUARDS for own in guard.columns]
    assert sorted(columns) == sorted(GUARDS_TABLE.arrow.names[2:])
    assert len(set(columns)) == len(columns)


def test_only_what_training_changes_tells_of_collapse() -> None:
    assert [guard.name for guard in GUARDS if not guard.tells_of_collapse] == [
        "moved_pixels",
        "truncated_share",
    ]


def test_guards_without_iteration_0_are_refused() -> None:
    with pytest.raises(UserError, match="those of iterations 1, 2; iteration 0 is needed"):
        seed_row([{"iteration": 1}, {"iteration": 2}])


def test_a_policy_that_hardly_moved_is_a_finding_with_its_size_and_no_collapse(
    rows: list[Measured],
) -> None:
    # 0.002 of 1 is 0.51 grey levels; of 0.2 it is 1 %, as 0.09 of 9 is. log(0.7 / 0.3) = 0.847.
    assert rows[0]["held_out_logit"] == pytest.approx(0.8473, abs=1e-4)
    (sentence,) = (text for text in warnings_of(rows[0], rows[0], Limits()) if "moved" in text)
    assert "iter00 hardly moved" in sentence
    assert "0.51 of 255 grey levels, 1.0%" in sentence
    assert "logit is 0.85" in sentence
    assert "learning rate" in sentence
    # By pixels iteration 1 moved as little, by features 5.6 %.
    assert not any("moved" in text for text in warnings_of(rows[1], rows[0], Limits()))
    assert any(
        "moved" in text for text in warnings_of(rows[1], rows[0], Limits(min_moved_share=0.1))
    )
    assert "moved_pixels" not in [guard.name for guard in GUARDS if guard.tells_of_collapse]


def test_without_the_bases_images_nothing_is_said_of_how_far_it_moved(
    rows: list[Measured],
) -> None:
    unknown = rows[0] | dict.fromkeys(("moved_pixels", "moved_features", "held_out_logit"))
    assert not any("moved" in text for text in warnings_of(unknown, unknown, Limits()))
