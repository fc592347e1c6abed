"""Human labels in Pick-a-Pic columns: what is kept, and what each kind of bad input is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.core.artifacts.tables import read_metadata
from stages.core.errors import UserError
from stages.import_preferences import Args, main
from tests.builders import CAPTIONS, encoded, human_row, picture, read_rows, write_rows

Rows = list[dict[str, Any]]
Run = Callable[..., Args]


@pytest.fixture
def args_for(tmp_path: Path) -> Run:
    """Args for a file of some rows."""

    def make(rows: Sequence[dict[str, Any]], **changes: object) -> Args:
        args = Args(
            files=(write_rows(tmp_path / "human.parquet", rows),),
            num_pairs=None,
            num_holdout=1,
            seed=0,
            preferences=tmp_path / "out" / "preferences.parquet",
            holdout=tmp_path / "out" / "holdout.parquet",
            summary=tmp_path / "out" / "import.json",
        )
        return replace(args, **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture
def rows() -> Rows:
    """Six good rows of six captions."""
    return [human_row(caption, number % 2) for number, caption in enumerate(CAPTIONS[:6])]


def complaint(args: Args) -> str:
    with pytest.raises(UserError) as caught:
        main(args)
    assert not list(args.summary.parent.glob("*")), "something was written"
    return str(caught.value)


def test_counts_of_the_summary_add_up(imported: Args) -> None:
    report = json.loads(imported.summary.read_text())
    counts = {
        "rows_read": 10,
        "ties_dropped": 1,
        "unlabelled_dropped": 1,
        "bad_rows_dropped": 0,
        "pairs_kept": 4,
        "pairs_held_out": 2,
        "pairs_left_over": 2,
        "prompts_kept": 4,
        "prompts_held_out": 2,
    }
    assert {key: report[key] for key in counts} == counts
    assert (report["layout"], report["num_files"]) == ("pickapic", 1)
    assert report["resolutions"] == {"64x64": 12}


def test_winner_and_loser_are_the_bytes_that_the_label_says(imported: Args) -> None:
    source = read_rows(imported.files[0])
    for path in (imported.preferences, imported.holdout):
        for row in read_rows(path):
            original = source[row["source_row"]]
            winner = 0 if original["label_0"] == 1 else 1
            assert row["winner"]["bytes"] == original[f"jpg_{winner}"]
            assert row["loser"]["bytes"] == original[f"jpg_{1 - winner}"]
            assert row["prompt"] == original["caption"]
            assert (row["source"], row["iteration"]) == ("human", 0)
            assert row["source_file"] == str(imported.files[0])
            assert row["pair_id"].startswith("human-preferences-")


def test_held_out_pairs_share_no_prompt_with_the_seed_pairs(args_for: Run, rows: Rows) -> None:
    faded = [encoded(picture(c, strength=0.7)) for c in CAPTIONS[:6]]
    variants = [
        {**human_row(c), "caption": f"  {c.upper()} ", "jpg_1": image}
        for c, image in zip(CAPTIONS[:6], faded, strict=True)
    ]
    for seed in range(5):
        args = args_for(rows + variants, num_holdout=3, seed=seed)
        main(args)
        seed_prompts, holdout_prompts = (
            {row["prompt_id"] for row in read_rows(path)}
            for path in (args.preferences, args.holdout)
        )
        assert len(read_rows(args.holdout)) == 3
        assert seed_prompts
        assert not seed_prompts & holdout_prompts


@pytest.mark.parametrize("cap", [3, 10, None])
def test_pairs_of_one_prompt_are_capped_and_the_summary_says_how_many_were_beyond(
    args_for: Run, rows: Rows, cap: int | None
) -> None:
    strengths = [0.2 + 0.05 * number for number in range(12)]
    of_one = [
        {**human_row(CAPTIONS[9]), "jpg_1": encoded(picture(CAPTIONS[9], strength=strength))}
        for strength in strengths
    ]
    kept = []
    for seed in range(4):
        args = args_for(rows + of_one, seed=seed, max_pairs_per_prompt=cap)
        main(args)
        tables = (*read_rows(args.preferences), *read_rows(args.holdout))
        names = [row["pair_id"] for row in tables if row["prompt"] == CAPTIONS[9]]
        report = json.loads(args.summary.read_text())
        assert report["most_pairs_of_a_prompt"] == 12
        assert report["pairs_beyond_cap"] == 12 - min(cap or 12, 12)
        if CAPTIONS[9] not in {row["prompt"] for row in read_rows(args.holdout)}:
            assert len(names) == min(cap or 12, 12)
        else:  # of a held-out prompt as many as are held out
            assert len(names) == 1
        kept.append(frozenset(names))
    assert len(set(kept)) > 1 or cap is None  # the seed draws them


def test_the_seed_decides_which_pairs_are_held_out(args_for: Run, rows: Rows) -> None:
    found = []
    for seed in (0, 0, 1, 2, 3):
        args = args_for(rows, seed=seed, num_holdout=2)
        main(args)
        found.append([row["pair_id"] for row in read_rows(args.holdout)])
    assert found[0] == found[1]
    assert any(other != found[0] for other in found[2:])


def test_a_table_without_has_label_and_images_as_structs_are_read(
    args_for: Run, rows: Rows
) -> None:
    for row in rows:
        del row["has_label"]
        row["jpg_0"] = {"bytes": row["jpg_0"], "path": None}
    args = args_for(rows)
    main(args)
    assert len(read_rows(args.preferences)) == 5


def test_several_files_are_read_as_one(args_for: Run, rows: Rows, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "more.parquet", [human_row(c) for c in CAPTIONS[6:9]])
    args = args_for(rows)
    args = replace(args, files=(*args.files, other))
    main(args)
    ids = [row["pair_id"] for path in (args.preferences, args.holdout) for row in read_rows(path)]
    assert len(set(ids)) == len(ids) == 9
    assert list(read_metadata(args.preferences)["inputs"]) == sorted(map(str, args.files))


def test_labels_that_stand_in_two_files_are_two_votes_on_one_pair(
    args_for: Run, rows: Rows, tmp_path: Path
) -> None:
    twin = write_rows(tmp_path / "twin" / "human.parquet", rows)
    args = args_for(rows)
    args = replace(args, files=(*args.files, twin), num_holdout=2)
    main(args)
    names = [row["pair_id"] for row in read_rows(args.preferences)]
    assert len(set(names)) == len(names) == 4
    report = json.loads(args.summary.read_text())
    assert (report["repeated_pairs"], report["contradictory_pairs"]) == (6, 0)
    assert report["votes"] == {"2 to 0": 6}


def test_a_missing_file_is_named(args_for: Run, rows: Rows, tmp_path: Path) -> None:
    gone = tmp_path / "gone.parquet"
    assert f"{gone} does not exist" in complaint(replace(args_for(rows), files=(gone,)))


def test_a_file_that_is_no_parquet_is_named(args_for: Run, rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("caption,label_0\n")
    text = complaint(replace(args_for(rows), files=(tmp_path / "text.parquet",)))
    assert "text.parquet is no readable Parquet file" in text


@pytest.mark.parametrize("column", ["caption", "jpg_0", "jpg_1", "label_0", "label_1"])
def test_a_missing_column_is_named_with_the_file_and_what_there_is(
    args_for: Run, rows: Rows, column: str
) -> None:
    for row in rows:
        del row[column]
    args = args_for(rows)
    text = complaint(args)
    assert f"{args.files[0]} has no column '{column}' (found: " in text


@pytest.mark.parametrize("column", ["jpg_0", "jpg_1"])
@pytest.mark.parametrize(
    ("data", "reason"), [(b"no image", "no readable image"), (b"", "no bytes"), (None, "no bytes")]
)
def test_a_broken_image_is_named_with_file_row_column_and_reason(
    args_for: Run, rows: Rows, column: str, data: bytes | None, reason: str
) -> None:
    rows[4][column] = data
    args = args_for(rows)
    text = complaint(args)
    assert f"{args.files[0]}, row 4, column '{column}'" in text
    assert reason in text


def test_a_cut_off_image_is_refused(args_for: Run, rows: Rows) -> None:
    rows[2]["jpg_1"] = rows[2]["jpg_1"][:400]
    assert "row 2, column 'jpg_1'" in complaint(args_for(rows))


def test_a_broken_image_in_a_row_that_is_not_used_does_not_matter(
    args_for: Run, rows: Rows
) -> None:
    main(args_for([*rows, human_row(CAPTIONS[7], 0.5, jpg_0=b"no image")]))


@pytest.mark.parametrize(
    ("caption", "reason"), [(None, "null"), ("", "empty"), (" \t", "caption is ' \\t'")]
)
def test_a_caption_that_says_nothing_is_named_with_file_row_and_reason(
    args_for: Run, rows: Rows, caption: str | None, reason: str
) -> None:
    rows[3]["caption"] = caption
    args = args_for(rows)
    text = complaint(args)
    assert f"{args.files[0]}, row 3: the caption is" in text
    assert reason in text


def test_captions_that_are_no_text_are_refused(args_for: Run, rows: Rows) -> None:
    for number, row in enumerate(rows):
        row["caption"] = number
    assert "row 0: the caption is 0" in complaint(args_for(rows))


@pytest.mark.parametrize(
    ("label_0", "label_1"), [(1.0, 1.0), (0.0, 0.0), (0.7, 0.3), (None, None), (2.0, -1.0)]
)
def test_labels_that_name_no_winner_are_named_with_file_and_row(
    args_for: Run, rows: Rows, label_0: float | None, label_1: float | None
) -> None:
    rows[5] |= {"label_0": label_0, "label_1": label_1}
    for row in rows:
        row["label_0"] = None if row["label_0"] is None else float(row["label_0"])
        row["label_1"] = None if row["label_1"] is None else float(row["label_1"])
    args = args_for(rows)
    assert f"{args.files[0]}, row 5: label_0, label_1 = {label_0}, {label_1}" in complaint(args)


@pytest.mark.parametrize("num_usable", [0, 1, 2])
def test_fewer_than_two_seed_pairs_are_refused_with_the_numbers(
    args_for: Run, rows: Rows, num_usable: int
) -> None:
    ties = [human_row(caption, 0.5) for caption in CAPTIONS[6:9]]
    text = complaint(args_for(rows[:num_usable] + ties))
    assert f"{num_usable} usable pairs" in text
    assert "2 seed pairs are needed" in text


def test_more_pairs_than_there_are_are_refused_with_the_numbers(args_for: Run, rows: Rows) -> None:
    text = complaint(args_for(rows, num_pairs=6, num_holdout=2))
    assert "6 usable pairs, of which 2 are held out and 4 are left; 6 seed pairs" in text


def test_a_failed_import_leaves_the_tables_of_the_one_before(args_for: Run, rows: Rows) -> None:
    args = args_for(rows)
    main(args)
    before = args.preferences.read_bytes()
    rows[1]["jpg_0"] = b"no image"
    write_rows(args.files[0], rows)
    with pytest.raises(UserError, match="row 1"):
        main(args)
    assert args.preferences.read_bytes() == before
    assert len(list(args.summary.parent.iterdir())) == 3
