"""Every layout of labels: the pairs it makes, the same whatever the shards, and what bad input is told."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.core.data.image_spool import ImageSpool
from stages.core.data.layouts.labels import Cell
from stages.core.errors import UserError
from stages.import_preferences import Args, main
from tests.builders import CAPTIONS, encoded, human_row, picture, read_rows, write_rows
from tests.label_files import WRITERS, Pair, args_for, some_pairs

KINDS = list(WRITERS)
LINE = r"( \(line \d+\))?"


def write(kind: str, folder: Path, pairs: Sequence[Pair]) -> Args:
    WRITERS[kind][1](folder, pairs)
    return args_for(folder)


def found_pairs(args: Args) -> list[tuple[str, bytes, bytes]]:
    return sorted(
        (row["prompt"], row["winner"]["bytes"], row["loser"]["bytes"])
        for path in (args.preferences, args.holdout)
        for row in read_rows(path)
    )


def complaint(args: Args) -> str:
    with pytest.raises(UserError) as caught:
        main(args)
    assert not list(args.summary.parent.glob("*")), "something was written"
    return str(caught.value)


def report_of(args: Args) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(args.summary.read_text())
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_is_recognised_and_its_pairs_are_the_same_imported_again(
    kind: str, tmp_path: Path
) -> None:
    pairs = some_pairs()
    args = write(kind, tmp_path / "data", pairs)
    main(args)
    assert report_of(args)["layout"] == WRITERS[kind][0]
    assert found_pairs(args) == sorted(pairs)
    again = args_for(tmp_path / "again" / "data", files=(args.preferences, args.holdout))
    main(again)
    assert found_pairs(again) == sorted(pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_can_be_named(kind: str, tmp_path: Path) -> None:
    args = replace(write(kind, tmp_path / "data", some_pairs()), layout=WRITERS[kind][0])
    main(args)
    assert len(found_pairs(args)) == 6


def large(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, format="PNG")
    return buffer.getvalue()


BAD_IMAGES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "does not exist|no bytes|beside it"),
    "cut off": (encoded(picture(CAPTIONS[9]))[:400], "no readable image"),
    "no image": (b"a text", "no readable image"),
    "1 x 1": (encoded(np.zeros((1, 1, 3), np.uint8)), "1 x 1 pixels; expected at least 16 x 16"),
    "40 megapixels": (large(8000, 5000), "8000 x 5000 = 40.0 megapixels; at most 33.6"),
}


@pytest.mark.parametrize("bad", BAD_IMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_stops_the_import_with_file_row_and_reason_or_is_skipped_and_listed(
    kind: str, bad: str, tmp_path: Path
) -> None:
    data, reason = BAD_IMAGES[bad]
    pairs = some_pairs()
    good = [*pairs[:3], *pairs[4:]]
    pairs[3] = (pairs[3][0], pairs[3][1], data)
    args = write(kind, tmp_path / "data", pairs)
    text = complaint(args)
    row = {"rankings-csv": 7, "likes-csv": 7}.get(kind, 3)
    assert re.search(rf"{args.files[0]}[^,]*, row {row}{LINE}[,:] .*({reason})", text), text
    skipping = replace(args, skip_bad=1)
    main(skipping)
    assert found_pairs(skipping) == sorted(good)
    (listed,) = report_of(skipping)["bad_rows"]
    assert listed["row"] == row
    assert re.search(reason, listed["reason"])
    assert listed["file"].startswith(str(args.files[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_row_more_than_allowed_stops_and_lists_them_all(kind: str, tmp_path: Path) -> None:
    pairs = some_pairs()
    for row in (1, 3, 4):
        pairs[row] = (pairs[row][0], pairs[row][1], b"no image")
    args = replace(write(kind, tmp_path / "data", pairs), skip_bad=2)
    text = complaint(args)
    assert "3 rows cannot be used; preferences.skip_bad allows 2" in text
    assert text.count("no readable image") == 3
    main(replace(args, skip_bad=3))
    assert report_of(args)["bad_rows_dropped"] == 3


@pytest.mark.parametrize(
    ("caption", "reason"),
    [("", "the caption is|no prompt"), ("x" * 100_000, "has 100,000 letters, expected at most")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_that_cannot_be_one_is_named_with_its_row(
    kind: str, caption: str, reason: str, tmp_path: Path
) -> None:
    pairs = some_pairs()
    pairs[2] = (caption, *pairs[2][1:])
    args = write(kind, tmp_path / "data", pairs)
    row = {"rankings-csv": 4, "likes-csv": 4}.get(kind, 2)
    assert re.search(rf"row {row}{LINE}: .*({reason})", complaint(args))
    skipping = replace(args, skip_bad=2)  # a row an image: both rows are bad
    main(skipping)
    assert len(found_pairs(skipping)) == 5


@pytest.mark.parametrize(
    ("kind", "old", "new", "reason"),
    [
        ("pickapic-csv", ",1,0\r", ",1,1\r", "label_0, label_1 = 1.0, 1.0; expected 1, 0"),
        ("pickapic-csv", ",1,0\r", ",,\r", "label_0, label_1 = , ; expected 1, 0"),
        ("pickapic-csv", ",1,0\r", ",1,0,7\r", "6 cells under a head of 5"),
        ("rankings-csv", "0-w.jpg,0", "0-w.jpg,", "'rank' is ''; expected a number"),
        ("likes-csv", "0-w.jpg,1", "0-w.jpg,", "'liked' is ''; expected 1 (liked) or 0"),
        ("rankings-jsonl", "[1, 2]", "[1, null]", "'ranks' is None; expected a number"),
        ("rankings-jsonl", "[1, 2]", "[1]", "lists 2 images and 'ranks' 1 ranks"),
        ("likes-jsonl", '["images/0-l.jpg"]', "null", "'disliked' is None; expected a list"),
        ("pairs-jsonl", '{"prompt"', '{prompt"', "the line is no readable JSON"),
        ("pairs-csv", "images/0-w.jpg", "../secret.jpg", "leaves the data folder"),
        ("pairs-csv", "images/0-w.jpg", "/etc/hostname", "leaves the data folder"),
        ("pairs-jsonl", "images/0-w.jpg", "images/../../x.jpg", "leaves the data folder"),
        ("rankings-csv", "images/0-w.jpg", "../secret.jpg", "leaves the data folder"),
        ("likes-jsonl", "images/0-w.jpg", "../secret.jpg", "leaves the data folder"),
    ],
)
def test_a_row_that_says_nothing_usable_is_named(
    kind: str, old: str, new: str, reason: str, tmp_path: Path
) -> None:
    args = write(kind, tmp_path / "data", some_pairs())
    (tmp_path / "secret.jpg").write_bytes(encoded(picture(CAPTIONS[0])))
    (path,) = args.files[0].glob("labels.*")
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())
    message = complaint(args)
    assert f"{path}, row 0" in message
    assert reason in message


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    args = write("pairs-csv", tmp_path / "data", some_pairs())
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encoded(picture(CAPTIONS[0])))
    image = args.files[0] / "images" / "2-l.jpg"
    image.unlink()
    image.symlink_to(secret)
    assert "'images/2-l.jpg' leaves the data folder" in complaint(args)


def test_images_of_equal_rank_are_ties(tmp_path: Path) -> None:
    args = write("rankings-jsonl", tmp_path / "data", some_pairs())
    path = args.files[0] / "labels.jsonl"
    path.write_text(path.read_text().replace("[1, 2]", "[1, 1]", 1))
    main(args)
    assert report_of(args)["ties_dropped"] == 1
    assert len(found_pairs(args)) == 5


def test_a_csv_that_is_not_utf8_is_named_with_line_and_byte(tmp_path: Path) -> None:
    args = write("pairs-csv", tmp_path / "data", some_pairs())
    path = args.files[0] / "labels.csv"
    lines = path.read_bytes().split(b"\r\n")
    lines[3] = b"caf\xe9" + lines[3]
    path.write_bytes(b"\r\n".join(lines))
    for skip_bad in (0, 5):
        text = complaint(replace(args, skip_bad=skip_bad))
        assert f"{path}, line 4: byte 4 of the line is 0xe9; the file is not UTF-8" in text


@pytest.mark.parametrize("content", [None, "readme.md", "labels.txt"])
def test_a_folder_without_labels_is_refused(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if content:
        (folder / content).write_text("nothing")
    assert f"{folder} holds no labels; expected" in complaint(args_for(folder))


def test_columns_of_no_layout_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "labels.csv").write_text("prompt,score\na cat,3\n")
    assert "no layout has the columns prompt, score" in complaint(args_for(folder))


def test_files_of_two_layouts_are_refused(tmp_path: Path) -> None:
    one = write("pairs-csv", tmp_path / "one", some_pairs()).files[0] / "labels.csv"
    two = write("likes-csv", tmp_path / "two", some_pairs()).files[0] / "labels.csv"
    text = complaint(args_for(tmp_path / "data", files=(one, two)))
    assert f"{one} has the layout 'pairs' and {two} the layout 'likes'" in text


SHARDS = [
    "train-00000-of-00002",
    "train-00001-of-00002",
    "validation-00000-of-00001",
    "validation_unique-00000-of-00001-ab12",
]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards of three splits as on the hub, with other captions in each."""
    for number, name in enumerate(SHARDS):
        captions = CAPTIONS[3 * number : 3 * number + 3]
        write_rows(tmp_path / "data" / f"{name}.parquet", [human_row(c) for c in captions])
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("pattern", "captions"),
    [
        ("train-*", range(6)),
        ("validation-*", range(6, 9)),
        ("validation_unique-*.parquet", range(9, 12)),
    ],
)
def test_a_pattern_names_one_split(shards: Path, pattern: str, captions: range) -> None:
    args = args_for(shards, files=(shards / pattern,), num_holdout=0)
    main(args)
    assert [pair[0] for pair in found_pairs(args)] == sorted(CAPTIONS[n] for n in captions)


@pytest.mark.parametrize("pattern", ["", "*", "validation*", "*-00000-*"])
def test_files_of_several_splits_are_refused(shards: Path, pattern: str) -> None:
    text = complaint(args_for(shards, files=(shards / pattern,)))
    assert "validation, validation_unique" in text
    assert "name one" in text


def test_a_pattern_that_matches_nothing_is_named(shards: Path) -> None:
    assert "test-* matches no file" in complaint(args_for(shards, files=(shards / "test-*",)))


def test_a_dataset_dict_is_refused_with_its_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        WRITERS["pairs-arrow"][1](tmp_path / "data" / split, some_pairs())
    (tmp_path / "data" / "dataset_dict.json").write_text("{}")
    assert "holds the splits test, train" in complaint(args_for(tmp_path / "data"))
    args = args_for(tmp_path / "data", files=(tmp_path / "data" / "train",))
    main(args)
    assert len(found_pairs(args)) == 6


def voted(number: int) -> dict[str, object]:
    """A row of Pick-a-Pic: six captions with several votes each, images that recur."""
    caption, other = CAPTIONS[number % 6], 0.2 + 0.1 * (number % 7)
    images = [encoded(picture(caption)), encoded(picture(caption, strength=other))]
    return {
        **human_row(caption, number % 2),
        "jpg_0": images[0],
        "jpg_1": images[1],
        "image_0_uid": f"{caption}-best",
        "image_1_uid": f"{caption}-{other}",
        "ranking_id": 1000 + number,
    }


IDS = ("ranking_id", "image_0_uid", "image_1_uid")


@pytest.mark.parametrize("without", [(), ("ranking_id",), IDS])
def test_the_same_pairs_are_chosen_whatever_the_number_and_the_order_of_the_shards(
    tmp_path: Path, without: Sequence[str]
) -> None:
    rows = [{k: v for k, v in voted(n).items() if k not in without} for n in range(40)]
    rng = np.random.default_rng(0)
    results = []
    for count in (1, 2, 7):
        for turn in range(2):
            order = rng.permutation(40) if turn else np.arange(40)
            folder = tmp_path / f"{count}-{turn}" / "data"
            for shard, part in enumerate(np.array_split(order, count)):
                name = f"train-{(shard * 5) % count:05d}-of-{count:05d}.parquet"
                write_rows(folder / name, [rows[row] for row in part])
            args = args_for(folder, num_pairs=17, num_holdout=8)
            main(args)
            results.append(
                [
                    {k: v for k, v in row.items() if k not in ("source_file", "source_row")}
                    for path in (args.preferences, args.holdout)
                    for row in read_rows(path)
                ]
            )
    assert len(results[0]) == 25
    assert all(result == results[0] for result in results[1:])
    assert len({row["pair_id"] for row in results[0]}) == 25


def test_an_image_that_recurs_is_kept_once_until_it_is_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.parquet", [voted(n) for n in range(40)])
    args = args_for(tmp_path / "data", num_holdout=0)
    main(args)
    different = {data for pair in found_pairs(args) for data in pair[1:]}
    assert len(found_pairs(args)) == 40
    assert report_of(args)["repeated_images"] == 80 - len(different)
    assert len(different) < 50


def test_two_images_of_one_uid_are_refused_with_both_rows(tmp_path: Path) -> None:
    rows = [voted(n) for n in range(12)]
    rows[6]["jpg_0"] = encoded(picture(CAPTIONS[1]))  # row 0 has another picture under this uid
    path = write_rows(tmp_path / "data" / "train.parquet", rows)
    args = args_for(tmp_path / "data", num_holdout=0)
    text = complaint(args)
    assert f"{path}, row 6, column 'jpg_0'" in text
    assert f"other bytes than the one of the same uid in {path}, row 0, column 'jpg_0'" in text
    main(replace(args, skip_bad=1))
    assert len(found_pairs(args)) == 11


def test_pairs_that_are_left_over_take_the_place_of_bad_ones(tmp_path: Path) -> None:
    pairs = some_pairs(9)
    args = replace(write("pairs-csv", tmp_path / "data", pairs), num_pairs=4, num_holdout=2)
    main(args)
    before = {pair[0] for pair in found_pairs(args)}
    victim = next(row for row, pair in enumerate(pairs) if pair[0] in before)
    (args.files[0] / "images" / f"{victim}-w.jpg").write_bytes(b"no image")
    main(replace(args, skip_bad=1))
    after = {pair[0] for pair in found_pairs(args)}
    assert len(after) == 6
    assert before - after == {pairs[victim][0]}
    assert report_of(args)["bad_rows_dropped"] == 1


def test_prompts_of_evaluation_sets_are_left_out_and_counted(tmp_path: Path) -> None:
    pairs = some_pairs()
    args = write("pairs-csv", tmp_path / "data", pairs)
    (tmp_path / "evaluation.txt").write_text(f"{pairs[0][0].upper()}\n a  {pairs[4][0][2:]}\nother")
    main(replace(args, exclude=(tmp_path / "evaluation.txt",)))
    assert report_of(args)["pairs_in_other_sets_dropped"] == 2
    assert found_pairs(args) == sorted([*pairs[1:4], pairs[5]])


def test_the_report_counts_repeats_contradictions_look_alikes_and_sizes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    losers = [encoded(np.repeat(np.repeat(one[::8, ::8], 8, 0), 8, 1)) for one in noise]
    pairs = [
        (prompt, winner, loser)
        for (prompt, winner, _), loser in zip(some_pairs(4), losers, strict=True)
    ]
    prompt, winner, loser = pairs[0]
    again = encoded(picture(prompt), "PNG")  # looks like the winner, is another file
    wide = encoded(np.asarray(Image.open(io.BytesIO(winner)).resize((96, 64))))
    pairs += [
        (prompt, winner, loser),
        (prompt, loser, winner),
        (prompt, winner, winner),
        (prompt, winner, again),
        (prompt, wide, loser),
    ]
    args = replace(write("pairs-parquet", tmp_path / "data", pairs), num_holdout=0)
    main(args)
    report = report_of(args)
    assert report["repeated_pairs"] == 2
    assert report["contradictory_pairs"] == 1
    assert report["votes"] == {"2 to 1": 1, "1 to 0": 5}
    assert report["same_image_dropped"] == 1
    assert report["near_duplicate_pairs"] == 1
    assert report["repeated_images"] == 12 - 10
    assert report["resolutions"] == {"64x64": 11, "96x64": 1}


def test_captions_longer_than_the_encoder_reads_are_counted(tmp_path: Path, tiny_base: str) -> None:
    pairs = some_pairs(4)
    pairs[1] = (pairs[1][0] + " on a black background" * 8, *pairs[1][1:])
    args = replace(
        write("pairs-csv", tmp_path / "data", pairs), tokenizer=Path(tiny_base) / "tokenizer"
    )
    main(args)
    long = report_of(args)["long_captions"]
    assert long == {"tokens_read": 24, "captions_cut": 1, "examples": [pairs[1][0]]}


@pytest.mark.parametrize("edge", [0, 1])
def test_images_above_the_limit_are_refused_before_they_are_decoded(
    tmp_path: Path, edge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    args = write("pairs-csv", tmp_path / "data", some_pairs())
    path = args.files[0] / "images" / "0-w.jpg"
    path.write_bytes(large(8192 + edge, 4096))
    if edge:
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", refuse)
        assert "8193 x 4096 = 33.6 megapixels; at most 33.6" in complaint(args)
    else:
        main(args)


def test_the_spool_is_gone_when_the_import_ends(tmp_path: Path) -> None:
    args = write("pairs-csv", tmp_path / "data", some_pairs())
    main(args)
    assert sorted(path.name for path in args.summary.parent.iterdir()) == [
        "holdout.parquet",
        "import.json",
        "preferences.parquet",
    ]
    with ImageSpool(tmp_path / "spool") as spool:
        assert not list((tmp_path / "spool").iterdir())
        assert (tmp_path, Cell(0, "chosen")) not in spool


def test_a_csv_of_image_paths_and_ranks_has_an_image_a_row(tmp_path: Path) -> None:
    args = write("rankings-csv", tmp_path / "data", some_pairs())
    path = args.files[0] / "labels.csv"
    path.write_text(path.read_text().replace("prompt,image,rank", "Prompt,image_path,Rank"))
    main(args)
    assert report_of(args)["layout"] == "rankings"
    assert len(found_pairs(args)) == 6


@pytest.mark.parametrize("kind", ["rankings-csv", "likes-csv"])
def test_images_of_one_prompt_make_pairs_also_where_they_stand_in_different_files(
    kind: str, tmp_path: Path
) -> None:
    whole = write(kind, tmp_path / "whole" / "data", some_pairs())
    main(whole)
    assert len(found_pairs(whole)) == 6
    split = write(kind, tmp_path / "split" / "data", some_pairs())
    labels = split.files[0] / "labels.csv"
    head, *lines = labels.read_text().splitlines()
    labels.unlink()
    files = [labels.with_name(f"part-{part}.csv") for part in range(2)]
    for part, file in enumerate(files):  # all winners, then all losers
        file.write_text("\n".join([head, *lines[part::2]]))
    for order in (files, files[::-1]):
        args = replace(split, files=tuple(order))
        main(args)
        for path, other in ((args.preferences, whole.preferences), (args.holdout, whole.holdout)):
            rows = [
                [
                    (row["pair_id"], row["prompt"], row["winner"], row["loser"])
                    for row in read_rows(p)
                ]
                for p in (path, other)
            ]
            assert rows[0] == rows[1]
        assert {row["source_file"] for row in read_rows(args.preferences)} == {str(files[0])}
        assert (report_of(args)["rows_read"], report_of(args)["num_files"]) == (12, 2)
    (labels.parent / "images" / "2-l.jpg").write_bytes(b"no image")
    main(replace(split, skip_bad=1))
    assert len(found_pairs(split)) == 5
    (bad,) = report_of(split)["bad_rows"]
    assert (bad["file"], bad["row"]) == (str(files[1]), 2)


def test_a_folder_that_datasets_wrote_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    pairs = some_pairs()
    image = datasets.Image()
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "chosen": image, "rejected": image}
    )
    rows = {
        "prompt": [pair[0] for pair in pairs],
        "chosen": [{"bytes": pair[1], "path": None} for pair in pairs],
        "rejected": [{"bytes": pair[2], "path": None} for pair in pairs],
    }
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(str(tmp_path / "data"), num_shards=2)
    args = args_for(tmp_path / "data")
    main(args)
    assert found_pairs(args) == sorted(pairs)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path / "both"))
    assert "holds the splits test, train" in complaint(
        replace(args_for(tmp_path / "both"), summary=tmp_path / "other" / "import.json")
    )
    dataset.to_parquet(str(tmp_path / "table" / "train.parquet"))
    args = args_for(tmp_path / "table")
    main(args)
    assert found_pairs(args) == sorted(pairs)
