"""Labels as people have them: of every table the right winner is known, and none may be guessed.

The better image of a pair is red, the worse one blue: a swapped label is seen at once.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.core.data.layouts.columns import Columns
from stages.core.data.layouts.labels import Ledger
from stages.core.data.layouts.recognition import find_layout
from stages.core.data.prompts import read_pool
from stages.core.errors import UserError
from stages.import_preferences import Args, main
from tests.builders import pixels_of, read_rows
from tests.label_files import args_for

Row = dict[str, Any]
COUNT = 6
RED, BLUE = (220, 40, 40), (40, 40, 220)


def image(colour: tuple[int, int, int], number: int, kind: str = "PNG") -> bytes:
    """A picture of one colour, with a mark of its own."""
    pixels = np.full((32, 32, 3), colour, np.uint8)
    pixels[: 4 + number % 20, :4] = 128
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format=kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the better (`0w.png`) and the worse image (`0l.png`) of each pair."""
    data = tmp_path / "data"
    data.mkdir()
    for number in range(COUNT):
        (data / f"{number}w.png").write_bytes(image(RED, number))
        (data / f"{number}l.png").write_bytes(image(BLUE, number))
    return data


def prompt(number: int) -> str:
    return f"a thing number {number}"


def colours(args: Args) -> list[str]:
    """What stands where the winner should, then what stands where the loser should, of each pair."""
    found = []
    for path in (args.preferences, args.holdout):
        for row in read_rows(path):
            sides = [
                pixels_of(row[side]).reshape(-1, 3).mean(axis=0) for side in ("winner", "loser")
            ]
            found.append(" over ".join("red" if s[0] > s[2] + 20 else "blue" for s in sides))
    return found


def report_of(args: Args) -> Row:
    report: Row = json.loads(args.summary.read_text())
    return report


def write_json(path: Path, rows: Sequence[Row]) -> None:
    path.write_text(json.dumps(list(rows)))


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: Sequence[Row], delimiter: str = ",", **options: Any) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", **options) as file:
        writer = csv.DictWriter(file, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def imported(folder: Path, **changes: Any) -> Args:
    args = args_for(folder, **changes)
    main(args)
    return args


def complaint(folder: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        main(args_for(folder, **changes))
    return str(caught.value)


def turned(number: int) -> bool:
    """Whether the better image stands second: never in all rows alike."""
    return number % 3 == 1


def sides(number: int, first: str, second: str) -> Row:
    better, worse = f"{number}w.png", f"{number}l.png"
    return {first: worse, second: better} if turned(number) else {first: better, second: worse}


def table(judge: Callable[[int], Row], first: str, second: str, text: str = "prompt") -> list[Row]:
    return [{text: prompt(n), **sides(n, first, second), **judge(n)} for n in range(COUNT)]


PUBLIC: dict[str, tuple[str, list[Row]]] = {
    "HPDv2 train": ("rankings", [
        {"prompt": prompt(n), "file_path": list(sides(n, "a", "b").values()), "user_hash": f"u{n}",
         "human_preference": [int(not turned(n)), int(turned(n))]} for n in range(COUNT)]),
    "HPDv2 test": ("rankings", [
        {"prompt": prompt(n), "image_path": list(sides(n, "a", "b").values()),
         "rank": [1 + turned(n), 2 - turned(n)]} for n in range(COUNT)]),
    "HPDv3": ("comparisons", [
        {"prompt": prompt(n), "path1": f"{n}w.png", "path2": f"{n}l.png", "confidence": 0.9,
         "choice_dist": [9, 1]} for n in range(COUNT)]),
    "ImageRewardDB": ("rankings", [
        {"image_path": f"{n}{side}.png", "prompt_id": f"{n:06d}", "prompt": prompt(n), "rank": rank,
         "overall_rating": 4} for n in range(COUNT) for rank, side in ((2, "l"), (1, "w"))]),
    "Rapidata": ("comparisons", table(
        lambda n: {"votes_image1": 3 if turned(n) else 9, "votes_image2": 9 if turned(n) else 3,
                   "model1": "x", "model2": "y"}, "image1", "image2")),
    "MJ-Bench": ("comparisons", table(
        lambda n: {"label": int(turned(n))}, "image0", "image1", "caption")),
    "arena": ("comparisons", table(
        lambda n: {"winner": "model_b" if turned(n) else "model_a"}, "image_a", "image_b")),
    "Argilla": ("comparisons", table(
        lambda n: {"preference.responses": ["image_2" if turned(n) else "image_1"],
                   "preference.responses.users": ["ann"]}, "image_1", "image_2")),
    "Label Studio": ("labelstudio", [
        {"id": n, "data": {"prompt": prompt(n), **sides(n, "image1", "image2")},
         "annotations": [{"result": [{"type": "pairwise", "value": {
             "selected": "right" if turned(n) else "left"}}]}]} for n in range(COUNT)]),
    "Label Studio, small": ("comparisons", table(
        lambda n: {"id": n, "pw": "right" if turned(n) else "left", "annotator": 1},
        "image1", "image2")),
    "KTO": ("likes", [
        {"prompt": prompt(n), "image": f"{n}{side}.png", "label": side == "w"}
        for n in range(COUNT) for side in "lw"]),
    "Pick-a-Pic with paths": ("pickapic", table(
        lambda n: {"label_0": int(not turned(n)), "label_1": int(turned(n)), "HAS_LABEL": True},
        "image_0", "image_1", "CAPTION")),
}  # fmt: skip
"""Tables of public sets and tools, with the layout that they are read as."""


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_public_sets_labels_are_read_rightly(folder: Path, name: str, kind: str) -> None:
    layout, rows = PUBLIC[name]
    path = folder / f"labels.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        (write_json if kind == "json" else write_lines)(path, rows)
    args = imported(folder)
    assert report_of(args)["layout"] == layout
    assert colours(args) == ["red over blue"] * COUNT


GUESSES: dict[str, list[Row]] = {
    "a list and scores": [
        {"prompt": prompt(n), "images": [f"{n}l.png", f"{n}w.png"], "scores": [0.1, 0.9]}
        for n in range(COUNT)],
    "a list and a preference": [
        {"prompt": prompt(n), "images": [f"{n}l.png", f"{n}w.png"], "preference": 1}
        for n in range(COUNT)],
    "a list alone": [
        {"prompt": prompt(n), "images": [f"{n}w.png", f"{n}l.png"]} for n in range(COUNT)],
    "two images and a label": table(lambda n: {"label": int(turned(n))}, "image_0", "image_1"),
    "two images and a vote": table(lambda n: {"vote": int(turned(n))}, "image_a", "image_b"),
    "two images and an unclear winner": table(
        lambda n: {"winner": int(turned(n))}, "image_a", "image_b"),
    "soft labels": table(
        lambda n: {"label_0": 0.3 if turned(n) else 0.7, "label_1": 0.7 if turned(n) else 0.3},
        "image_0", "image_1"),
    "scores an image": [
        {"prompt": prompt(n), "image": f"{n}{side}.png", "score": score}
        for n in range(COUNT) for side, score in (("w", 8), ("l", 3))],
    "counts of likes": [
        {"prompt": prompt(n), "image": f"{n}{side}.png", "likes": score}
        for n in range(COUNT) for side, score in (("w", 8), ("l", 3))],
}  # fmt: skip
"""Tables whose verdict has a name or values that could mean anything."""

MAPPINGS: dict[str, tuple[Columns, str]] = {
    "a list and scores": (Columns(image="images", score="scores"), "rankings"),
    "two images and a label": (
        Columns(image_a="image_0", image_b="image_1", winner="label"), "comparisons"),
    "two images and a vote": (
        Columns(image_a="image_a", image_b="image_b", winner="vote", winner_a="0", winner_b="1"),
        "comparisons"),
    "two images and an unclear winner": (
        Columns(image_a="image_a", image_b="image_b", winner="winner", winner_a="0", winner_b="1"),
        "comparisons"),
    "soft labels": (
        Columns(image_a="image_0", image_b="image_1", probability_a="label_0", tie_below=0.1),
        "comparisons"),
    "scores an image": (Columns(image="image", score="score"), "rankings"),
    "counts of likes": (Columns(image="image", score="likes"), "rankings"),
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSES)
def test_a_verdict_that_could_mean_anything_is_refused_with_the_way_out(
    folder: Path, name: str
) -> None:
    write_lines(folder / "labels.jsonl", GUESSES[name])
    text = complaint(folder)
    assert "labels.jsonl" in text
    assert "preferences.columns" in text or "expected 1 (liked) or 0" in text


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_says_what_its_columns_mean(folder: Path, name: str) -> None:
    write_lines(folder / "labels.jsonl", GUESSES[name])
    columns, layout = MAPPINGS[name]
    args = imported(folder, columns=columns)
    assert report_of(args)["layout"] == layout
    assert colours(args) == ["red over blue"] * COUNT


def test_an_order_ranks_where_the_user_says_so(folder: Path) -> None:
    write_lines(folder / "labels.jsonl", GUESSES["a list alone"])
    assert colours(imported(folder, layout="rankings")) == ["red over blue"] * COUNT


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (Columns(image_a="image_a"), "names image_a; expected chosen and rejected, or image_a and"),
        (Columns(image_a="image_a", image_b="image_b"), "expected chosen and rejected"),
        (
            Columns(image_a="image_a", image_b="image_b", winner="vote", probability_a="vote"),
            "with one of winner, probability_a",
        ),
        (
            Columns(image_a="left", image_b="image_b", winner="vote"),
            "no column 'left', which preferences.columns.image_a names",
        ),
        (Columns(image="image_a", rank="vote", like="vote"), "one of rank, score, like"),
    ],
)
def test_a_mapping_that_says_too_little_or_two_things_is_refused(
    folder: Path, columns: Columns, reason: str
) -> None:
    write_lines(folder / "labels.jsonl", GUESSES["two images and a vote"])
    assert reason in complaint(folder, columns=columns)


def test_ranks_that_begin_late_and_ranks_that_are_null_judge_their_rows_alone(folder: Path) -> None:
    rows = [{"prompt": prompt(n), "images": [f"{n}l.png", f"{n}w.png"]} for n in range(COUNT)]
    late = [*({**rows[n % COUNT], "prompt": f"{n} of many"} for n in range(12)),
            *({**row, "ranks": [2, 1]} for row in rows)]  # fmt: skip
    write_lines(folder / "labels.jsonl", late)
    args = imported(folder)
    assert colours(args) == ["red over blue"] * COUNT
    assert report_of(args)["unlabelled_dropped"] == 12
    (folder / "labels.jsonl").unlink()
    null = [{**row, "ranks": [2, 1] if n > 1 else None} for n, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(null), folder / "labels.parquet")
    args = imported(folder)
    assert colours(args) == ["red over blue"] * (COUNT - 2)
    assert report_of(args)["unlabelled_dropped"] == 2


@pytest.mark.parametrize("column", ["prompt_id", "session", "annotator", "USER_HASH"])
def test_only_images_that_were_judged_together_are_compared(folder: Path, column: str) -> None:
    rows = [
        {"prompt": prompt(0), "image": f"{n}{side}.png", "rank": rank, column: f"g{n}"}
        for n in range(COUNT) for side, rank in (("w", 1), ("l", 2))
    ]  # fmt: skip
    write_csv(folder / "labels.csv", rows)
    assert colours(imported(folder, num_holdout=0)) == ["red over blue"] * COUNT


def test_a_group_that_the_user_names_counts_alone(folder: Path) -> None:
    rows = [
        {"prompt": prompt(0), "image": f"{n}{side}.png", "rank": rank, "batch": n, "session": side}
        for n in range(COUNT) for side, rank in (("w", 1), ("l", 2))
    ]  # fmt: skip
    write_csv(folder / "labels.csv", rows)
    columns = Columns(image="image", rank="rank", group=("batch",))
    assert colours(imported(folder, num_holdout=0, columns=columns)) == ["red over blue"] * COUNT


def test_votes_become_a_majority_and_an_image_is_never_beside_itself(folder: Path) -> None:
    votes = {0: ["a", "a", "b"], 1: ["a"], 2: ["a", "b"], 3: ["a", "a"]}
    rows = [
        {"prompt": prompt(n), "image_a": f"{n}w.png", "image_b": f"{n}l.png", "winner": vote}
        for n, given in votes.items() for vote in given
    ]  # fmt: skip
    rows.append({"prompt": prompt(4), "image_a": "4w.png", "image_b": "4w.png", "winner": "a"})
    (folder / "copy.png").write_bytes((folder / "5w.png").read_bytes())
    rows.append({"prompt": prompt(5), "image_a": "5w.png", "image_b": "copy.png", "winner": "a"})
    write_csv(folder / "labels.csv", rows)
    args = imported(folder, num_holdout=0)
    report = report_of(args)
    assert colours(args) == ["red over blue"] * 3
    assert report["votes"] == {"2 to 1": 1, "1 to 0": 2, "2 to 0": 1}
    assert (report["repeated_pairs"], report["contradictory_pairs"]) == (4, 2)
    assert (report["votes_tied_dropped"], report["same_image_dropped"]) == (1, 2)


def test_one_image_liked_and_disliked_is_no_pair(folder: Path) -> None:
    rows = [
        {"prompt": prompt(n), "image": f"{n}{side}.png", "liked": liked}
        for n in range(COUNT) for side, liked in (("w", 1), ("l", 0), ("w", 0))
    ]  # fmt: skip
    write_csv(folder / "labels.csv", rows)
    args = imported(folder)
    assert colours(args) == ["red over blue"] * COUNT
    assert report_of(args)["same_image_dropped"] == COUNT


def test_lists_of_chosen_and_rejected_images_are_all_read(folder: Path) -> None:
    rows = [
        {"prompt": prompt(n), "chosen": [f"{n}w.png", f"{n + 1}w.png"],
         "rejected": [f"{n}l.png", f"{n + 1}l.png"]} for n in range(3)
    ]  # fmt: skip
    write_lines(folder / "labels.jsonl", rows)
    assert colours(imported(folder, num_holdout=0)) == ["red over blue"] * 12


PAIRS: list[Row] = [
    {"prompt": f'a thing, "number" {n}', "chosen": f"{n}w.png", "rejected": f"{n}l.png"}
    for n in range(COUNT)
]


def as_text(delimiter: str) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(PAIRS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(PAIRS)
    return buffer.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in PAIRS)
FILES: dict[str, tuple[str, bytes]] = {
    "pandas' index column": ("x.csv", "".join(
        f"{number},{line}" for number, line in zip(
            ["", *map(str, range(COUNT))], as_text(",").splitlines(True), strict=True)
    ).encode()),
    "semicolons": ("x.csv", b"\xef\xbb\xbf" + as_text(";").encode()),
    "sep=": ("x.csv", b"sep=;\r\n" + as_text(";").encode()),
    "UTF-16": ("x.csv", as_text("\t").encode("utf-16")),
    "capitals": ("LABELS.CSV", as_text(",").upper().replace("W.PNG", "w.png").replace(
        "L.PNG", "l.png").encode()),
    "spaces in the head": ("x.csv", as_text(",").replace(",chosen,", ", chosen , ").encode()),
    "tabs with quotes": ("x.tsv", as_text("\t").encode()),
    "lines in .json": ("x.json", LINES.encode()),
    "ndjson": ("x.ndjson", LINES.encode()),
    "gzip": ("x.csv.gz", gzip.compress(as_text(",").encode())),
    "gzip lines": ("x.jsonl.gz", gzip.compress(LINES.encode())),
    "Windows' separators": ("x.csv", as_text(",").replace("w.png", "W").replace(
        ",", ",.\\").replace(".\\chosen", "chosen").replace(".\\rejected", "rejected").replace(
        "W", "w.png").replace('thing,.\\ ""', 'thing, ""').encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_everyday_files_are_read(folder: Path, name: str) -> None:
    file, content = FILES[name]
    (folder / file).write_bytes(content)
    args = imported(folder)
    assert colours(args) == ["red over blue"] * COUNT
    prompts = {row["prompt"].lower() for path in (args.preferences, args.holdout)
               for row in read_rows(path)}  # fmt: skip
    assert prompts == {row["prompt"] for row in PAIRS}


def test_literal_quotes_between_tabs_stay(folder: Path) -> None:
    rows = [f'"{n}" is "a" number\t{n}w.png\t{n}l.png' for n in range(COUNT)]
    (folder / "x.tsv").write_text("prompt\tchosen\trejected\n" + "\n".join(rows) + "\n")
    args = imported(folder, num_holdout=0)
    found = {row["prompt"] for row in read_rows(args.preferences)}
    assert found == {f'"{n}" is "a" number' for n in range(COUNT)}


def test_a_spreadsheets_words_are_understood(folder: Path) -> None:
    rows = [
        {"caption": prompt(n), "image_0": f"{n}w.png", "image_1": f"{n}l.png",
         "label_0": "TRUE" if n > 1 else 0, "label_1": "FALSE" if n > 1 else 0,
         "HAS_LABEL": "TRUE" if n > 1 else "FALSE"} for n in range(COUNT)
    ]  # fmt: skip
    write_csv(folder / "x.csv", rows)
    args = imported(folder)
    assert colours(args) == ["red over blue"] * (COUNT - 2)
    assert report_of(args)["unlabelled_dropped"] == 2


@pytest.mark.parametrize("name", ["x.xlsx", "x.ods"])
def test_a_spreadsheet_is_refused_with_the_way_out(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"PK\x03\x04")
    for files in ((folder,), (folder / name,)):
        assert "save its sheet as 'CSV UTF-8'" in complaint(folder, files=files)


def test_a_name_in_another_unicode_form_is_found(folder: Path) -> None:
    for n in range(COUNT):
        for side in "wl":
            decomposed = unicodedata.normalize("NFD", f"grün{n}{side}.png")
            (folder / f"{n}{side}.png").rename(folder / decomposed)
    write_csv(folder / "x.csv", [
        {"prompt": prompt(n), "chosen": unicodedata.normalize("NFC", f"grün{n}w.png"),
         "rejected": unicodedata.normalize("NFC", f"grün{n}l.png")} for n in range(COUNT)])  # fmt: skip
    assert colours(imported(folder)) == ["red over blue"] * COUNT


def test_an_address_is_said_to_be_one(folder: Path) -> None:
    write_csv(folder / "x.csv", [{**row, "chosen": "https://a.example/x.png"} for row in PAIRS])
    assert "is an address, and nothing is fetched" in complaint(folder)


def test_a_root_lets_images_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    folder.rename(away)
    folder.mkdir()
    (tmp_path / "linked").mkdir()
    for n in range(COUNT):
        for side in "wl":
            (tmp_path / "linked" / f"{n}{side}.png").symlink_to(away / f"{n}{side}.png")
    whole = [{**row, "chosen": str(away / row["chosen"])} for row in PAIRS]
    write_csv(folder / "x.csv", PAIRS)
    assert "does not exist" in complaint(folder)
    for root in (away, tmp_path / "linked"):
        assert colours(imported(folder, root=root)) == ["red over blue"] * COUNT
    write_csv(folder / "x.csv", whole)
    assert "leaves the data folder" in complaint(folder)
    assert colours(imported(folder, root=away)) == ["red over blue"] * COUNT
    write_csv(folder / "x.csv", [{**row, "chosen": "../data/x.csv"} for row in PAIRS])
    assert "leaves the data folder" in complaint(folder, root=away)
    assert "is no folder" in complaint(folder, root=tmp_path / "nowhere")


FOLDERS = [("win", "lose"), ("Winner", "Loser"), ("chosen", "rejected"), ("w", "l")]


@pytest.mark.parametrize("names", FOLDERS, ids="-".join)
@pytest.mark.parametrize("caption", [".txt", ".caption"])
def test_folders_of_any_usual_name_and_depth_are_read_and_the_rest_is_named(
    tmp_path: Path, names: tuple[str, str], caption: str
) -> None:
    folder = tmp_path / "data"
    for part, colour in zip(names, (RED, BLUE), strict=True):
        (folder / part / "deeper").mkdir(parents=True)
        for n in range(COUNT):
            place = folder / part / ("deeper" if n > 2 else "") / f"{n}"
            kinds = [("JPEG", ".jfif"), ("AVIF", ".avif"), ("PNG", ".img")]
            kind, suffix = kinds[n % 3]
            place.with_suffix(suffix).write_bytes(image(colour, n, kind))
            place.with_suffix(caption).write_text(prompt(n))
        (folder / part / "._0.jfif").write_bytes(b"what macOS keeps")
        (folder / part / "notes.pdf").write_bytes(b"%PDF-1.4")
    args = imported(folder)
    assert colours(args) == ["red over blue"] * COUNT
    assert [Path(p).name for p in report_of(args)["files_not_read"]] == ["notes.pdf"] * 2


@pytest.mark.parametrize("ends", [("_w", "_l"), ("_W", "_L"), ("_win", "_lose")], ids="".join)
def test_suffixes_of_any_usual_name_are_read_with_a_caption_beside_each_image(
    tmp_path: Path, ends: tuple[str, str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(COUNT):
        for end, colour in zip(ends, (RED, BLUE), strict=True):
            (folder / f"{n}{end}.png").write_bytes(image(colour, n))
            (folder / f"{n}{end}.txt").write_text(prompt(n))
    assert colours(imported(folder)) == ["red over blue"] * COUNT
    (folder / f"0{ends[0]}.txt").write_text("another thing")
    assert "differ; the two images of a pair have one prompt" in complaint(folder)


def test_a_table_beside_images_that_end_like_a_side_is_the_table(folder: Path) -> None:
    (folder / "0l.png").rename(folder / "0_l.png")
    rows = [dict(row) for row in PAIRS]
    rows[0]["rejected"] = "0_l.png"
    write_lines(folder / "labels.jsonl", rows)
    args = imported(folder)
    assert report_of(args)["layout"] == "pairs"
    assert colours(args) == ["red over blue"] * COUNT


@pytest.mark.parametrize(
    "places",
    [("train.jsonl", "test.jsonl"), ("default/train/0.jsonl", "default/test/0.jsonl"),
     ("train/metadata.jsonl", "validation/metadata.jsonl"), ("train-0000.jsonl", "val-0000.jsonl")],
)  # fmt: skip
def test_splits_are_told_apart_by_files_and_folders(folder: Path, places: tuple[str, str]) -> None:
    for number, place in enumerate(places):
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**row, "prompt": f"{number} {row['prompt']}"} for row in PAIRS]
        write_lines(path, rows)
    assert "files of the splits" in complaint(folder, root=folder)
    assert "files of the splits" in complaint(folder, files=(folder / "**/*.jsonl",), root=folder)
    args = imported(folder, files=(folder / places[0],), root=folder)
    assert colours(args) == ["red over blue"] * COUNT


def test_two_stars_read_folders_of_any_depth(folder: Path) -> None:
    for depth, rows in (("", PAIRS[:2]), ("a", PAIRS[2:4]), ("a/b", PAIRS[4:])):
        (folder / depth).mkdir(exist_ok=True)
        write_lines(folder / depth / "x.jsonl", rows)
    args = imported(folder, files=(folder / "**/*.jsonl",), root=folder)
    assert colours(args) == ["red over blue"] * COUNT


def test_the_line_of_a_bad_row_is_given(folder: Path) -> None:
    text = 'prompt,chosen,rejected\n"a\nthing",0w.png,0l.png\n\n\nb,1w.png,nowhere.png\n'
    (folder / "x.csv").write_text(text)
    assert "row 1 (line 6), column 'rejected'" in complaint(folder, num_holdout=0)


def test_with_nothing_left_the_reasons_are_shown(folder: Path) -> None:
    write_lines(folder / "x.jsonl", [{**row, "chosen": "nowhere.png"} for row in PAIRS])
    text = complaint(folder, skip_bad=100)
    assert "0 usable pairs" in text
    assert "6 rows cannot be used" in text
    assert text.count("'nowhere.png' does not exist") == COUNT


def test_many_bad_rows_are_noted_in_linear_time(tmp_path: Path) -> None:
    taken = []
    for count in (20_000, 80_000):
        ledger, started = Ledger(10**9), time.process_time()
        for row in range(count):
            ledger.note_bad(tmp_path, row, "bad")
        taken.append(time.process_time() - started)
    assert taken[1] < 12 * taken[0]  # 4 times as many; quadratic were 16


def test_a_pool_may_be_the_label_files_themselves(folder: Path, tmp_path: Path) -> None:
    schema = pa.Table.from_pylist(PAIRS)
    with pa.ipc.new_stream(tmp_path / "data-0.arrow", schema.schema) as stream:
        stream.write_table(schema)
    (tmp_path / "state.json").write_text("{}")
    assert len(read_pool(tmp_path / "data-0.arrow", tmp_path / "state.json").prompts) == COUNT
    (folder / "x.csv").write_text(as_text(",") + "torn\n")
    pool = read_pool(folder / "x.csv")
    assert (len(pool.prompts), pool.num_left_out) == (COUNT, 1)
    captions = [folder / f"{n}.caption" for n in range(2)]
    for n, path in enumerate(captions):
        path.write_text(prompt(n))
    assert len(read_pool(*captions, folder / "0w.png").prompts) == 2


def test_a_layout_and_a_mapping_of_another_are_refused(folder: Path) -> None:
    write_lines(folder / "x.jsonl", PAIRS)
    columns = Columns(chosen="chosen", rejected="rejected")
    with pytest.raises(UserError, match="preferences.layout is 'likes'"):
        find_layout([folder], "likes", columns)
    assert replace(args_for(folder), columns=columns).columns.layout == "pairs"
