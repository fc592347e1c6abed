"""From a key in the audit to the next policy: exactly what depends on a decision is made anew, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.core.artifacts.decisions import image_digest
from stages.core.artifacts.tables import read_metadata
from stages.core.audit.desk import Desk, journal_of
from stages.core.pages.journal import Journal
from tests.builders import Row, read_rows
from tests.workflow.projects import RUN, Project

pytestmark = pytest.mark.xdist_group("finished")


def audit(project: Project, *keys: tuple[Row, str]) -> list[Path]:
    """Start the audit, press keys on pairs, end it; the tables that were written."""
    with Journal(journal_of(project.results)) as journal:
        desk = Desk(project.results, journal)
        written = desk.compact()
        for pair, kind in keys:
            digests = (image_digest(pair[side]["bytes"]) for side in ("winner", "loser"))
            desk.decide(pair, *digests, kind)
        return [*written, *desk.compact()]


@pytest.mark.slow
def test_a_decision_remakes_the_mix_and_what_follows_and_then_nothing(
    finished: Project, tmp_path: Path
) -> None:
    project = finished.copy(tmp_path / "copy")
    table = project.results / "iter02/pairs.parquet"
    chosen, mix = read_rows(table), project.results / "iter02/preferences.parquet"
    [written] = audit(project, (chosen[0], "veto"), (chosen[1], "flip"), (chosen[2], "accept"))
    planned = project.planned()
    assert planned["mix_preferences"] == planned["update_policy"] == 1
    assert not {"select_pairs", "sample_candidates", "train_seed"} & set(planned)
    project.make()
    assert project.planned() == {}
    made = {row["pair_id"]: row for row in read_rows(mix)}
    assert chosen[0]["pair_id"] not in made
    assert made[chosen[1]["pair_id"]]["winner"] == chosen[1]["loser"]
    assert made[chosen[2]["pair_id"]] == chosen[2]
    assert f"results/{RUN}/decisions/{written.name}" in read_metadata(mix)["inputs"]
    assert read_rows(table) == chosen
    assert audit(project) == audit(project, (chosen[2], "accept"), (chosen[0], "veto")) == []
    assert project.planned() == {}
    written.unlink()  # and the journal with it: the decisions are gone
    journal_of(project.results).unlink()
    assert project.planned()["mix_preferences"] == 1
