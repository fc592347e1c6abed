"""The answers as a table, and that table through the import of labels: nothing is turned round on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages import import_preferences
from stages.core.artifacts.schemas import HUMAN_LABELS, PREFERENCES
from stages.core.artifacts.tables import read_metadata, read_table
from stages.core.errors import UserError
from stages.core.labelling.desk import Desk
from stages.core.labelling.export import Exported, write_labels
from tests.builders import encoded, picture, read_rows
from tests.labelling.builders import open_desk, write_images


def better(desk: Desk, labeller: str) -> str:
    """The side of image 0, the sharpest."""
    shown = desk.current(labeller)
    assert shown is not None
    left, _right = shown.pair.sides(labeller)
    return "left" if left.name.endswith("0.png") else "right"


def label(desk: Desk, labeller: str, *choices: str) -> None:
    """Answer as told; 'better' and 'worse' are by the truth."""
    for choice in choices:
        side = better(desk, labeller)
        other = "right" if side == "left" else "left"
        shown = desk.current(labeller)
        assert shown is not None
        word = {"better": side, "worse": other}.get(choice, choice)
        assert desk.answer(labeller, shown.pair.key, word)


def exported(desk: Desk, path: Path, journal: Path) -> Exported:
    return write_labels(path, desk.gallery, desk.answers(), arguments={}, journal=journal)


def imported(tmp_path: Path, path: Path, num_holdout: int = 2) -> tuple[list[dict[str, Any]], Any]:
    import_preferences.main(
        import_preferences.Args(
            files=(path,), num_pairs=None, num_holdout=num_holdout, seed=0,
            preferences=tmp_path / "preferences.parquet", holdout=tmp_path / "holdout.parquet",
            summary=tmp_path / "import.json",
        )
    )  # fmt: skip
    rows = [
        row
        for name in ("preferences", "holdout")
        for row in read_table(tmp_path / f"{name}.parquet", PREFERENCES).to_pylist()
    ]
    return rows, json.loads((tmp_path / "import.json").read_text())


def test_what_people_chose_is_what_the_import_reads(tmp_path: Path) -> None:
    images, journal = write_images(tmp_path / "images", 16), tmp_path / "answers.jsonl"
    with open_desk([images], journal) as desk:
        label(desk, "ann", *["better"] * 10, "tie", "both_bad", "skip", "worse", "tie", "better")
        done = exported(desk, tmp_path / "labels.parquet", journal)
        worse = desk.answers()[13]
    assert done == Exported(preferences=12, ties=2, both_bad=1, skipped=1, stale=0)
    table = read_rows(tmp_path / "labels.parquet")
    assert len(table) == 14
    assert {row["winner"] for row in table} == {"image_a", "image_b", "tie"}
    rows, report = imported(tmp_path, tmp_path / "labels.parquet")
    assert (report["layout"], report["ties_dropped"]) == ("comparisons", 2)
    assert (report["pairs_kept"], report["pairs_held_out"]) == (10, 2)
    folders = {(folder / "prompt.txt").read_text().strip(): folder for folder in images.iterdir()}
    for row in rows:
        folder = folders[row["prompt"]]
        names = ["1.png", "0.png"] if row["prompt"] == worse.prompt else ["0.png", "1.png"]
        assert [row["winner"]["bytes"], row["loser"]["bytes"]] == [
            (folder / name).read_bytes() for name in names
        ]


def test_several_verdicts_on_one_pair_become_one_by_majority(tmp_path: Path) -> None:
    images, journal = write_images(tmp_path / "images", 4), tmp_path / "answers.jsonl"
    with open_desk([images], journal, share=1.0) as desk:
        for labeller, choice in (("ann", "better"), ("bob", "better"), ("eve", "worse")):
            label(desk, labeller, *[choice] * 4)
        assert exported(desk, tmp_path / "labels.parquet", journal).preferences == 12
    rows, report = imported(tmp_path, tmp_path / "labels.parquet", num_holdout=1)
    assert len(rows) == 4
    assert report["votes"] == {"2 to 1": 4}
    for row in rows:
        assert row["winner"]["bytes"] == encoded(picture(row["prompt"]), "PNG")


def test_the_table_says_who_when_which_side_and_what_it_was_made_of(tmp_path: Path) -> None:
    images, journal = write_images(tmp_path / "images", 3), tmp_path / "answers.jsonl"
    with open_desk([images], journal, share=1.0) as desk:
        label(desk, "ann é", "better", "better")
        exported(desk, tmp_path / "labels.parquet", journal)
        answers = desk.answers()
    table = read_table(tmp_path / "labels.parquet", HUMAN_LABELS).to_pylist()
    for row, answer in zip(table, answers, strict=True):
        assert (row["labeller"], row["is_common"]) == ("ann é", True)
        assert (row["image_a_name"], row["image_b_name"]) == (answer.left.name, answer.right.name)
        assert row["image_a"]["bytes"] == (images / answer.left.name).read_bytes()
        assert row["labelled_at"].endswith("+00:00")
    assert list(read_metadata(tmp_path / "labels.parquet")["inputs"]) == [str(journal)]


def test_answers_about_changed_images_are_left_out_and_counted(tmp_path: Path) -> None:
    images, journal = write_images(tmp_path / "images", 5), tmp_path / "answers.jsonl"
    with open_desk([images], journal) as desk:
        label(desk, "ann", *["better"] * 5)
        answers = desk.answers()
        (images / answers[0].left.name).write_bytes(encoded(picture("an orange ring"), "PNG"))
        (images / answers[1].right.name).unlink()
        done = write_labels(
            tmp_path / "labels.parquet", desk.gallery, answers, arguments={}, journal=journal
        )
    assert (done.preferences, done.stale) == (3, 2)
    assert "2 answers about images that have changed since or are gone" in str(done)
    kept = {row["prompt"] for row in read_rows(tmp_path / "labels.parquet")}
    assert kept == {answer.prompt for answer in answers[2:]}


def test_many_labels_are_written_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.core.labelling.export.AT_ONCE", 3)
    images, journal = write_images(tmp_path / "images", 10), tmp_path / "answers.jsonl"
    with open_desk([images], journal) as desk:
        label(desk, "ann", *["better"] * 10)
        exported(desk, tmp_path / "labels.parquet", journal)
    assert len(imported(tmp_path, tmp_path / "labels.parquet")[0]) == 10


def test_ties_alone_are_no_pairs_and_the_import_says_so(tmp_path: Path) -> None:
    images, journal = write_images(tmp_path / "images", 3), tmp_path / "answers.jsonl"
    with open_desk([images], journal) as desk:
        label(desk, "ann", "tie", "tie", "both_bad")
        exported(desk, tmp_path / "labels.parquet", journal)
    with pytest.raises(UserError, match="2 ties dropped"):
        imported(tmp_path, tmp_path / "labels.parquet", num_holdout=0)
