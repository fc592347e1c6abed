"""Labels of the same pairs in every layout that can be imported."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.import_preferences import Args
from tests.builders import CAPTIONS, encoded, picture, write_rows

Pair = tuple[str, bytes | None, bytes | None]
"""A prompt, and the bytes of the better and the worse image; None for one that is missing."""

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def some_pairs(count: int = 6) -> list[Pair]:
    """Pairs of different captions with pictures of their own, as JPEG files."""
    return [
        (caption, encoded(picture(caption)), encoded(picture(caption, strength=0.5, edge_width=6)))
        for caption in CAPTIONS[:count]
    ]


def args_for(folder: Path, **changes: object) -> Args:
    """An import of a folder's labels into `out` beside it, one pair held out."""
    out = folder.parent / "out"
    args = Args(
        files=(folder,), num_pairs=None, num_holdout=1, seed=0,
        preferences=out / "preferences.parquet", holdout=out / "holdout.parquet",
        summary=out / "import.json",
    )  # fmt: skip
    return replace(args, **changes)  # type: ignore[arg-type]


def write_images(folder: Path, pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    """(prompt, path of the winner, path of the loser), the paths in `folder`; the files are written."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (prompt, *images) in enumerate(pairs):
        names = [f"images/{number}-{side}.jpg" for side in "wl"]
        for name, data in zip(names, images, strict=True):
            if data is not None:
                (folder / name).write_bytes(data)
        rows.append((prompt, *names))
    return rows


def pickapic(folder: Path, pairs: Sequence[Pair]) -> None:
    rows = []
    for number, (prompt, winner, loser) in enumerate(pairs):
        label = float(number % 2)
        images = (winner, loser) if label else (loser, winner)
        rows.append({"caption": prompt, "jpg_0": images[0], "jpg_1": images[1],
                     "label_0": label, "label_1": 1 - label, "ranking_id": number})  # fmt: skip
    write_rows(folder / "train-00000-of-00001.parquet", rows)


def pickapic_csv(folder: Path, pairs: Sequence[Pair]) -> None:
    rows = write_images(folder, pairs)
    _csv(folder, ["caption", "image_0", "image_1", "label_0", "label_1"],
         [(*row, 1, 0) for row in rows])  # fmt: skip


def parquet(folder: Path, pairs: Sequence[Pair]) -> None:
    table = _chosen(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "labels.parquet", row_group_size=2)


def arrow(folder: Path, pairs: Sequence[Pair]) -> None:
    """As `datasets.save_to_disk` writes it."""
    table = _chosen(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")


def csv_pairs(folder: Path, pairs: Sequence[Pair]) -> None:
    _csv(folder, ["prompt", "chosen", "rejected"], write_images(folder, pairs))


def jsonl(folder: Path, pairs: Sequence[Pair]) -> None:
    names = ("prompt", "chosen", "rejected")
    _jsonl(folder, [dict(zip(names, row, strict=True)) for row in write_images(folder, pairs)])


def rankings(folder: Path, pairs: Sequence[Pair]) -> None:
    _jsonl(folder, [{"prompt": prompt, "images": images, "ranks": [1, 2]}
                    for prompt, *images in write_images(folder, pairs)])  # fmt: skip


def rankings_csv(folder: Path, pairs: Sequence[Pair]) -> None:
    rows = [(prompt, image, rank) for prompt, *images in write_images(folder, pairs)
            for rank, image in enumerate(images)]  # fmt: skip
    _csv(folder, ["prompt", "image", "rank"], rows)


def likes(folder: Path, pairs: Sequence[Pair]) -> None:
    _jsonl(folder, [{"prompt": prompt, "liked": [winner], "disliked": [loser]}
                    for prompt, winner, loser in write_images(folder, pairs)])  # fmt: skip


def likes_csv(folder: Path, pairs: Sequence[Pair]) -> None:
    rows = [(prompt, image, 1 - rank) for prompt, *images in write_images(folder, pairs)
            for rank, image in enumerate(images)]  # fmt: skip
    _csv(folder, ["prompt", "image", "liked"], rows)


def folders(folder: Path, pairs: Sequence[Pair]) -> None:
    for number, (prompt, *images) in enumerate(pairs):
        for part, data in zip(("win", "lose"), images, strict=True):
            (folder / part).mkdir(parents=True, exist_ok=True)
            if data is not None:
                (folder / part / f"{number}.jpg").write_bytes(data)
        (folder / f"{number}.txt").write_text(prompt)


def suffixes(folder: Path, pairs: Sequence[Pair]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (_prompt, *images) in enumerate(pairs):
        for side, data in zip("wl", images, strict=True):
            if data is not None:
                (folder / f"{number}_{side}.jpg").write_bytes(data)
    rows = [{"name": str(number), "prompt": prompt} for number, (prompt, *_) in enumerate(pairs)]
    (folder / "prompts.json").write_text(json.dumps(rows))


def webdataset(folder: Path, pairs: Sequence[Pair]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "000.tar", "w") as archive:
        for number, (prompt, winner, loser) in enumerate(pairs):
            members = {"chosen.jpg": winner, "rejected.jpg": loser,
                       "json": json.dumps({"prompt": prompt}).encode()}  # fmt: skip
            for kind, data in members.items():
                if data is not None:
                    member = tarfile.TarInfo(f"{number:06d}.{kind}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


WRITERS: dict[str, tuple[str, Callable[[Path, Sequence[Pair]], None]]] = {
    "pickapic": ("pickapic", pickapic),
    "pickapic-csv": ("pickapic", pickapic_csv),
    "pairs-parquet": ("pairs", parquet),
    "pairs-arrow": ("pairs", arrow),
    "pairs-csv": ("pairs", csv_pairs),
    "pairs-jsonl": ("pairs", jsonl),
    "pairs-webdataset": ("pairs", webdataset),
    "rankings-jsonl": ("rankings", rankings),
    "rankings-csv": ("rankings", rankings_csv),
    "likes-jsonl": ("likes", likes),
    "likes-csv": ("likes", likes_csv),
    "folders": ("folders", folders),
    "suffixes": ("suffixes", suffixes),
}
"""Name, the layout it is recognised as, and what writes pairs so."""


def _chosen(pairs: Sequence[Pair]) -> pa.Table:
    columns = list(zip(*pairs, strict=True))
    images = [
        pa.array([{"bytes": data, "path": None} for data in column], STRUCT)
        for column in columns[1:]
    ]
    return pa.table({"prompt": list(columns[0]), "chosen": images[0], "rejected": images[1]})


def _csv(folder: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def _jsonl(folder: Path, rows: Sequence[object]) -> None:
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
