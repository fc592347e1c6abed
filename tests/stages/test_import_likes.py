"""Single likes: which images are trained on, which are held out two by two, and what bad input is told."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from stages.core.artifacts.schemas import LIKED_PAIRS, LIKES, PREFERENCES
from stages.core.artifacts.tables import read_metadata, read_table
from stages.core.data.prompts import prompt_id
from stages.import_preferences import Args, main
from tests.builders import CAPTIONS, encoded, picture, read_rows
from tests.label_files import WRITERS, args_for, some_pairs
from tests.stages.test_import_layouts import complaint, report_of

Like = tuple[str, float, bool]
"""A caption, the strength of its picture, and whether it was liked."""


def write_likes(folder: Path, likes: Sequence[Like]) -> list[tuple[str, bytes, bool]]:
    """A CSV file of likes and the images that it names; (caption, bytes, liked) of each row."""
    folder.mkdir(parents=True)
    rows, found = [], []
    for number, (caption, strength, is_liked) in enumerate(likes):
        data = encoded(picture(caption, strength=strength))
        (folder / f"{number}.jpg").write_bytes(data)
        rows.append((caption, f"{number}.jpg", int(is_liked)))
        found.append((caption, data, is_liked))
    with (folder / "likes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "image", "liked"), *rows])
    return found


ALONE = [(caption, 1.0, number % 3 > 0) for number, caption in enumerate(CAPTIONS[:12])]
"""Twelve captions with one image each: eight were liked, four were not."""


def likes_args(folder: Path, **changes: object) -> Args:
    return args_for(folder, unpaired=True, **changes)


def held_out_images(args: Args) -> list[tuple[str, bytes, bool]]:
    rows = read_rows(args.holdout)
    return [(row["prompt"], row["winner"]["bytes"], True) for row in rows] + [
        (row["loser_prompt"], row["loser"]["bytes"], False) for row in rows
    ]


def test_every_image_is_trained_on_or_held_out_as_it_was_labelled(tmp_path: Path) -> None:
    given = write_likes(tmp_path / "data", ALONE)
    args = likes_args(tmp_path / "data", num_holdout=2)
    main(args)
    rows = read_rows(args.preferences)
    trained = [(row["prompt"], row["image"]["bytes"], row["is_liked"]) for row in rows]
    assert sorted([*trained, *held_out_images(args)]) == sorted(given)
    for row in rows:
        assert row["prompt_id"] == prompt_id(row["prompt"])
        assert given[row["source_row"]][:2] == (row["prompt"], row["image"]["bytes"])
        assert (row["source"], Path(row["source_file"]).name) == ("human", "likes.csv")
    assert len({row["image_id"] for row in rows}) == 8
    for row in read_rows(args.holdout):
        assert given[row["source_row"]][2]
        assert not given[row["loser_source_row"]][2]
    report = report_of(args)
    kept = {"images_kept": 8, "liked_kept": 6, "disliked_kept": 2, "pairs_held_out": 2}
    assert kept.items() <= report.items()
    assert (report["images_left_over"], report["prompts_kept"], report["prompts_held_out"]) == (0, 8, 4)  # fmt: skip
    assert report["resolutions"] == {"64x64": 12}


def test_the_tables_say_what_they_are_and_the_held_out_ones_are_preferences_too(
    tmp_path: Path,
) -> None:
    write_likes(tmp_path / "data", ALONE)
    args = likes_args(tmp_path / "data", num_holdout=2)
    main(args)
    for path, schema in ((args.preferences, LIKES), (args.holdout, LIKED_PAIRS)):
        read_table(path, schema)
        assert read_metadata(path)["schema"] == f"{schema.name}/{schema.version}"
    assert len(read_table(args.holdout, PREFERENCES)) == 2


def test_held_out_images_of_one_prompt_are_put_side_by_side_and_their_prompts_not_trained_on(
    tmp_path: Path,
) -> None:
    both = [
        (caption, strength, strength > 0.7) for caption in CAPTIONS[:6] for strength in (1.0, 0.5)
    ]
    write_likes(tmp_path / "data", both)
    for seed in range(4):
        args = likes_args(tmp_path / "data", num_holdout=3, seed=seed)
        main(args)
        held_out = read_rows(args.holdout)
        assert len(held_out) == 3
        assert all(row["prompt"] == row["loser_prompt"] for row in held_out)
        trained = {row["prompt"] for row in read_rows(args.preferences)}
        assert len(trained) == 3
        assert not trained & {row["prompt"] for row in held_out}


def test_a_prompt_whose_images_are_not_wanted_any_more_is_trained_on(tmp_path: Path) -> None:
    """Of nine liked and one disliked image, all of other prompts, two are held out, whatever comes first."""
    write_likes(tmp_path / "data", [(c, 1.0, n > 1) for n, c in enumerate(CAPTIONS[:11])])
    for seed in range(6):
        args = likes_args(tmp_path / "data", num_holdout=1, seed=seed)
        main(args)
        assert report_of(args)["images_kept"] == 9


def test_the_same_images_are_chosen_from_any_order_of_rows_and_another_seed_chooses_others(
    tmp_path: Path,
) -> None:
    found = []
    for number, (likes, seed) in enumerate([(ALONE, 0), (ALONE[::-1], 0), (ALONE, 1)]):
        folder = tmp_path / str(number) / "data"
        write_likes(folder, likes)
        args = likes_args(folder, num_holdout=2, num_pairs=7, seed=seed)
        main(args)
        rows = read_rows(args.preferences)
        found.append([(row["prompt"], row["image"]["bytes"], row["is_liked"]) for row in rows])
    assert len(found[0]) == 7
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_votes_on_one_image_are_counted_and_a_tie_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_likes(folder, ALONE)
    lines = (folder / "likes.csv").read_text().splitlines()
    more = [lines[1][:-1] + "1", *[lines[2][:-1] + "0"] * 2]  # 0.jpg: 0, 1; 1.jpg: 1, 0, 0
    (folder / "likes.csv").write_text("\n".join([*lines, *more]))
    args = likes_args(folder, num_holdout=1)
    main(args)
    report = report_of(args)

    assert report["rows_read"] == 15
    assert report["votes"] == {"1 to 0": 10, "2 to 1": 1}
    assert (report["votes_tied_dropped"], report["contradictory_labels"]) == (1, 2)
    assert report["repeated_labels"] == 3
    said = {row["prompt"]: row["is_liked"] for row in read_rows(args.preferences)}
    said |= {prompt: is_liked for prompt, _, is_liked in held_out_images(args)}
    assert CAPTIONS[0] not in said
    assert said[CAPTIONS[1]] is False


def test_images_of_one_prompt_are_capped(tmp_path: Path) -> None:
    many = [(CAPTIONS[0], 0.3 + 0.1 * n, n % 2 == 0) for n in range(6)]
    write_likes(tmp_path / "data", [*ALONE[1:], *many])
    args = likes_args(tmp_path / "data", num_holdout=1, max_pairs_per_prompt=2)
    main(args)
    report = report_of(args)
    assert (report["images_beyond_cap"], report["most_images_of_a_prompt"]) == (4, 6)
    assert sum(row["prompt"] == CAPTIONS[0] for row in read_rows(args.preferences)) <= 2


def test_a_table_of_likes_can_be_imported_again(tmp_path: Path) -> None:
    write_likes(tmp_path / "data", ALONE)
    args = likes_args(tmp_path / "data", num_holdout=1)
    main(args)
    again = likes_args(tmp_path / "again" / "data", files=(args.preferences,), num_holdout=1)
    main(again)
    assert report_of(again)["layout"] == "likes"
    rows = [*read_rows(again.preferences)]
    given = {(row["image"]["bytes"], row["is_liked"]) for row in read_rows(args.preferences)}
    assert {(row["image"]["bytes"], row["is_liked"]) for row in rows} < given
    assert len(rows) == 8


def test_rows_that_list_liked_and_disliked_images_are_read_one_by_one(tmp_path: Path) -> None:
    WRITERS["likes-jsonl"][1](tmp_path / "data", some_pairs())
    args = likes_args(tmp_path / "data", num_holdout=1)
    main(args)
    winners = {winner for _, winner, _ in some_pairs()}
    rows = read_rows(args.preferences)
    assert len(rows) == 10
    assert all(row["is_liked"] == (row["image"]["bytes"] in winners) for row in rows)


@pytest.mark.parametrize("kind", ["pairs-csv", "rankings-csv", "pickapic", "folders"])
def test_labels_that_compare_images_are_refused(kind: str, tmp_path: Path) -> None:
    WRITERS[kind][1](tmp_path / "data", some_pairs())
    text = complaint(likes_args(tmp_path / "data"))
    assert f"has the layout {WRITERS[kind][0]!r}, which compares images" in text
    assert "Set preferences.unpaired to false" in text


def test_too_few_of_a_kind_are_refused(tmp_path: Path) -> None:
    write_likes(tmp_path / "data", ALONE)
    text = complaint(likes_args(tmp_path / "data", num_holdout=5))
    assert "8 liked and 4 disliked images are usable" in text
    assert "preferences.num_holdout holds out 5 pairs of one liked and one disliked image" in text
    text = complaint(likes_args(tmp_path / "data", num_holdout=4))
    assert "beside 4 held-out pairs 4 liked and 0 disliked images are left to train on" in text
    text = complaint(likes_args(tmp_path / "data", num_holdout=2, num_pairs=6, seed=1))
    assert "num_pairs keeps 6 liked and 0 disliked images of 6 liked and 2 disliked images" in text
    text = complaint(likes_args(tmp_path / "data", num_holdout=1, num_pairs=11))
    assert "7 liked and 3 disliked images are left to train on; 11 images are needed" in text


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (",1.jpg,1", ",1.jpg,", "row 1 (line 3): 'liked' is ''; expected 1 (liked) or 0 (disliked)"),
        (",1.jpg,1", ",1.jpg,maybe", "'liked' is 'maybe'; expected 1 (liked) or 0 (disliked)"),
        (f"{CAPTIONS[1]},1.jpg", ",1.jpg", "row 1 (line 3): the caption is empty"),
        (",1.jpg", ",none.jpg", "row 1 (line 3), column 'image': the image 'none.jpg' does not exist"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_and_may_be_skipped(
    old: str, new: str, expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    write_likes(folder, ALONE)
    text = (folder / "likes.csv").read_text()
    assert old in text
    (folder / "likes.csv").write_text(text.replace(old, new))
    args = likes_args(folder)
    assert expected in complaint(args)
    main(replace(args, skip_bad=1))
    report = report_of(args)
    assert (report["bad_rows_dropped"], report["images_kept"]) == (1, 9)
