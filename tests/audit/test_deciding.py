"""Decisions from a key to the mix: kept, undone, noted, compacted; nothing rewritten for nothing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from stages import mix_preferences
from stages.core.artifacts.decisions import DECISIONS, decisions_file, image_digest
from stages.core.artifacts.tables import read_table
from stages.core.audit.desk import MAX_NOTE, journal_of
from stages.core.errors import UserError
from stages.core.pages.journal import Journal, read_journal
from tests.audit.conftest import auditing
from tests.audit.runs import write_iteration
from tests.builders import CAPTIONS, Row, read_rows
from tests.security.test_pages import Page


def shown(text: str) -> dict[str, str]:
    """What a fragment tells the script."""
    return {name: value for _, name, value in Page(text).attributes if name.startswith("data-")}


def post(client: TestClient, kind: str, about: str = "", view: str = "pairs", **more: str) -> Any:
    """Decide as the script does: about what is shown, by its digests."""
    facts = shown(client.get("/item", params={"view": view, "key": about, "only": "all"}).text)
    query = facts["data-query"]
    body = {
        "kind": kind,
        "winner": facts.get("data-winner", ""),
        "loser": facts.get("data-loser", ""),
    }
    content = f"{query}&" + "&".join(f"{name}={value}" for name, value in {**body, **more}.items())
    return client.post("/decide", content=content)


def pairs_of(run: Path, iteration: int = 1) -> list[Row]:
    return read_rows(run / f"iter{iteration:02d}/pairs.parquet")


def test_a_decision_is_in_the_journal_before_the_next_item_is_shown(
    client: TestClient, run: Path
) -> None:
    first, second, *_ = pairs_of(run)
    answer = post(client, "veto")
    assert f'data-said="vetoed: {CAPTIONS[0]}"' in answer.text
    assert shown(answer.text)["data-winner"] == image_digest(second["winner"]["bytes"])
    [entry] = read_journal(journal_of(run))
    assert entry["decision"] == "veto"
    assert entry["was_blind"] is False
    assert entry["winner_digest"] == image_digest(first["winner"]["bytes"])
    assert entry["loser_digest"] == image_digest(first["loser"]["bytes"])
    assert (entry["pair_id"], entry["policy_digest"]) == (first["pair_id"], first["policy_digest"])
    assert "0 accepted, 0 flipped, 1 vetoed" in answer.text
    assert '<span class="state veto">vetoed</span>' in client.get(f"/?key={first['pair_id']}").text


def test_undo_takes_back_one_after_the_other_and_shows_what_it_was_about(
    client: TestClient, run: Path
) -> None:
    first, second, third, *_ = pairs_of(run)
    post(client, "veto", first["pair_id"])
    post(client, "flip", first["pair_id"])
    post(client, "accept", second["pair_id"])
    post(client, "note", third["pair_id"], note="odd")
    back = [client.post("/undo", content="view=human").text for _ in range(5)]
    for text, said, key in zip(
        back,
        ("note", "accept", "flip", "veto"),
        (third, second, first, first),
        strict=False,
    ):
        assert f"taken back: {said} of" in shown(text)["data-said"]
        assert f"key={key['pair_id']}" in shown(text)["data-query"]
    assert "vetoed</span>" in back[2]  # the flip had taken the veto's place
    assert "vetoed</span>" not in back[3]
    assert shown(back[4])["data-said"] == "nothing to undo"


def test_what_is_decided_can_be_left_out_or_looked_at_alone(client: TestClient, run: Path) -> None:
    for pair in pairs_of(run)[:2]:
        post(client, "accept", pair["pair_id"])
    assert "<strong>1</strong> of 4 (of 6)" in client.get("/?only=open").text
    assert "<strong>1</strong> of 2 (of 6)" in client.get("/?only=decided").text


@pytest.mark.parametrize(
    ("kind", "view", "more", "status", "reason"),
    [
        ("destroy", "pairs", {}, 400, "found decision"),
        ("note", "pairs", {"note": "x" * (MAX_NOTE + 1)}, 400, "at most 2000 are kept"),
        ("veto", "pairs", {"winner": "0" * 64}, 409, "made anew. Nothing was kept"),
        ("veto", "pairs", {"key": "iter01-absent"}, 409, "no such pair"),
        ("flip", "holdout", {}, 409, "Held-out pairs measure the judge"),
    ],
)
def test_what_cannot_be_decided_is_refused_and_not_kept(
    client: TestClient, run: Path, kind: str, view: str, more: dict[str, str], status: int,
    reason: str,
) -> None:  # fmt: skip
    answer = post(client, kind, view=view, **more)
    assert (answer.status_code, reason in answer.text) == (status, True)
    assert read_journal(journal_of(run)) == []


def test_a_pair_that_was_made_anew_while_it_was_shown_is_not_decided_about(
    client: TestClient, run: Path
) -> None:
    before = shown(client.get("/item").text)
    write_iteration(run, CAPTIONS[:6][::-1], 1)  # the same prompts and names, other images
    content = f"{before['data-query']}&kind=veto&winner={before['data-winner']}&loser={before['data-loser']}"
    assert client.post("/decide", content=content).status_code == 409
    assert read_journal(journal_of(run)) == []


def mixed(run: Path) -> dict[str, Row]:
    """The mix of iteration 1, with the decisions that the rule would pass."""
    files = (decisions_file(run, 0), decisions_file(run, 1))
    args = mix_preferences.Args(
        pairs=run / "iter01/pairs.parquet", preferences=run / "seed/preferences.parquet",
        latents=run / "seed/preferences_latents.parquet", seed_fraction=0.6, seed=0, iteration=1,
        decisions=tuple(path for path in files if path.is_file()),
        output=run / "iter01/preferences.parquet",
    )  # fmt: skip
    mix_preferences.main(replace(args))
    return {row["pair_id"]: row for row in read_rows(args.output)}


def test_from_keys_to_the_mix(run: Path) -> None:
    pairs = {row["pair_id"]: row for row in pairs_of(run)}
    vetoed, flipped, accepted, undone, *_ = pairs
    human = {row["pair_id"]: row for row in read_rows(run / "seed/preferences.parquet")}
    assert set(mixed(run)) == {*pairs, *human}
    with auditing(run) as client:
        post(client, "veto", vetoed)
        post(client, "flip", flipped)
        post(client, "accept", accepted)
        post(client, "note", accepted, note="good")
        post(client, "flip", "human-000001", view="human")
        post(client, "veto", "human-000002", view="human")
        post(client, "veto", undone)
        client.post("/undo", content="")
    assert [row["decision"] for row in read_rows(decisions_file(run, 1))] == sorted(
        ["veto", "flip"], key=lambda kind: (vetoed, flipped)[kind == "flip"]
    )
    found = mixed(run)
    assert set(pairs) - set(found) == {vetoed}
    assert found[flipped]["winner"] == pairs[flipped]["loser"]
    assert found[flipped]["margin"] == -pairs[flipped]["margin"]
    assert found[accepted] == pairs[accepted]
    assert found[undone] == pairs[undone]
    assert set(human) - set(found) == {"human-000002"}
    assert found["human-000001"]["winner"] == human["human-000001"]["loser"]
    [note] = read_rows(run / "decisions/notes.parquet")
    assert (note["pair_id"], note["note"]) == (accepted, "good")


def times(run: Path) -> dict[str, int]:
    folder = run / "decisions"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


def test_looking_writes_no_table(run: Path) -> None:
    with auditing(run) as client:
        post(client, "accept")
    assert times(run) == {}


def test_a_table_that_says_the_same_keeps_its_time(run: Path) -> None:
    with auditing(run) as client:
        post(client, "veto")
        post(client, "note", note="why")
    before = times(run)
    assert set(before) == {"iter01.parquet", "notes.parquet"}
    with auditing(run) as client:
        client.post("/undo", content="")
        client.post("/undo", content="")
        post(client, "note", note="why")
        post(client, "veto")  # the same again, at another time
        post(client, "accept", pairs_of(run)[3]["pair_id"])
    assert times(run) == before


def test_one_iterations_decisions_leave_the_tables_of_the_others_alone(run: Path) -> None:
    write_iteration(run, CAPTIONS[6:10], 2)
    for path in decide_in_each(run):
        os.utime(path, ns=(1, 1))
    with auditing(run) as client:
        post(client, "flip", pairs_of(run, 2)[1]["pair_id"])
    found = times(run)
    assert found.pop("iter02.parquet") != 1
    assert set(found.values()) == {1}


def decide_in_each(run: Path) -> list[Path]:
    with auditing(run) as client:
        post(client, "veto", pairs_of(run, 1)[0]["pair_id"])
        facts = shown(client.get("/item?iteration=2").text)
        content = f"{facts['data-query']}&kind=veto&winner={facts['data-winner']}&loser={facts['data-loser']}"
        client.post("/decide", content=content)
        post(client, "flip", "human-000001", view="human")
    return list((run / "decisions").glob("*.parquet"))


def test_taking_back_the_last_decision_empties_the_table(run: Path) -> None:
    with auditing(run) as client:
        post(client, "veto")
    with auditing(run) as client:
        client.post("/undo", content="")
    assert read_table(decisions_file(run, 1), DECISIONS).num_rows == 0
    assert len(mixed(run)) == 12


def test_stale_decisions_are_kept_and_do_nothing(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with auditing(run) as client:
        post(client, "veto")
    write_iteration(run, CAPTIONS[:6][::-1], 1, policy="another")
    with auditing(run) as client:
        assert "vetoed</span>" not in client.get("/").text
        assert "of 6" in client.get("/?only=open").text
    assert len(mixed(run)) == 12
    with caplog.at_level("INFO"):
        mixed(run)
    assert "1 are stale" in caplog.text


def test_tables_without_their_journal_are_taken_over(run: Path) -> None:
    with auditing(run) as client:
        post(client, "flip")
        post(client, "note", note="copied")
    before = times(run)
    journal_of(run).unlink()
    with auditing(run) as client:
        page = client.get("/").text
        assert "flipped</span>" in page
        assert 'value="copied"' in page
    assert times(run) == before


def test_a_damaged_table_of_decisions_is_made_again_from_the_journal(run: Path) -> None:
    with auditing(run) as client:
        post(client, "veto")
    decisions_file(run, 1).write_bytes(b"not Parquet")
    with auditing(run):
        pass
    assert [row["decision"] for row in read_rows(decisions_file(run, 1))] == ["veto"]


def test_a_second_audit_of_a_run_is_refused(run: Path) -> None:
    with (
        auditing(run),
        pytest.raises(UserError, match="is written by another server, process"),
        Journal(journal_of(run)),
    ):
        pass
