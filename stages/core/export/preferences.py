"""Preference tables in the layouts that other trainers read, in bounded memory."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts.arrow_files import naming
from stages.core.artifacts.images import ImageError, image_kind
from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.schemas import IMAGE, PICKAPIC, PREFERENCES, Schema
from stages.core.errors import UserError

Format = Literal["pickapic", "preference", "imagefolder", "webdataset"]
Row = dict[str, Any]

ROWS_IN_MEMORY = 64
"""Rows of a batch, and of a row group of what is written: random access stays cheap."""
FILES_PER_FOLDER = 1000

_OURS = PREFERENCES.arrow
PREFERENCE = Schema(
    "exported_preferences",
    1,
    pa.schema(
        [
            _OURS.field("prompt"),
            _OURS.field("winner").with_name("chosen"),
            _OURS.field("loser").with_name("rejected"),
            _OURS.field("winner_score").with_name("chosen_score"),
            _OURS.field("loser_score").with_name("rejected_score"),
            _OURS.field("probability").with_name("prob"),
            _OURS.field("winner_seed").with_name("seed_chosen"),
            _OURS.field("loser_seed").with_name("seed_rejected"),
            _OURS.field("winner_candidate").with_name("index_chosen"),
            _OURS.field("loser_candidate").with_name("index_rejected"),
            *(
                _OURS.field(name)
                for name in (
                    "iteration",
                    "prompt_id",
                    "pair_id",
                    "source",
                    "policy_digest",
                    "margin",
                    "margin_standard_error",
                )
            ),
        ]
    ),
)
"""prompt, chosen and rejected, as hub collections and TRL name them, with each pair's lineage."""

OUR_NAMES = {
    "chosen": "winner",
    "rejected": "loser",
    "chosen_score": "winner_score",
    "rejected_score": "loser_score",
    "prob": "probability",
    "seed_chosen": "winner_seed",
    "seed_rejected": "loser_seed",
    "index_chosen": "winner_candidate",
    "index_rejected": "loser_candidate",
}
"""Where the columns of `PREFERENCE` come from, if they are called otherwise in our tables."""


@dataclass
class Counts:
    """What an export holds."""

    by_origin: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Pairs of each (source, iteration)."""
    policies: dict[int, str] = field(default_factory=dict)
    """Digest of the policy that sampled, of each iteration."""
    by_prompt: Counter[str] = field(default_factory=Counter)
    """Pairs of each prompt id."""

    @property
    def num_pairs(self) -> int:
        """All pairs."""
        return self.by_origin.total()


def count_pairs(tables: Sequence[Path], source: str | None) -> Counts:
    """What an export of these tables will hold; no image is read.

    UserError if that is nothing, or if a pair is there twice.
    """
    counts, seen = Counts(), set()
    columns = ("pair_id", "prompt_id", "source", "iteration", "policy_digest")
    for row in read_pairs(tables, source, columns):
        if row["pair_id"] in seen:
            raise UserError(
                f"{', '.join(map(str, tables))}: the pair {row['pair_id']} is there twice; name "
                "each table once"
            )
        seen.add(row["pair_id"])
        counts.by_origin[row["source"], row["iteration"]] += 1
        counts.by_prompt[row["prompt_id"]] += 1
        if row["policy_digest"]:
            counts.policies[row["iteration"]] = row["policy_digest"]
    if not seen:
        wanted = "pair" if source is None else f"{source} pair"
        raise UserError(f"{', '.join(map(str, tables))}: there is no {wanted} to export")
    return counts


def read_pairs(
    tables: Sequence[Path], source: str | None, columns: Sequence[str] = tuple(_OURS.names)
) -> Iterator[Row]:
    """The rows of preference tables one by one, those of one source if it is named.

    ArtifactError names the table and the column that is missing or of another type.
    """
    for path in tables:
        with naming(path, error_type=ArtifactError):
            file = _checked(path, columns)
            for batch in file.iter_batches(ROWS_IN_MEMORY, columns=list(columns)):
                for row in batch.to_pylist():
                    if source is None or row["source"] == source:
                        yield row


def typed_first(tables: Sequence[Path], source: str | None) -> Iterator[Row]:
    """The rows of `read_pairs`, those first that between them hold a value of every column.

    From JSON, `datasets` takes a column's type from its first samples, and a null there for all.
    """
    missing = {name for name in _OURS.names if name in map(_ours, PREFERENCE.arrow.names)
               and _OURS.field(name).type != IMAGE}  # fmt: skip
    columns, early = tuple({*missing, "source"}), set[int]()
    for number, row in enumerate(read_pairs(tables, source, columns)):
        found = {name for name in missing if row[name] is not None}
        early |= {number} if found else set()
        missing -= found
        if not missing:
            break
    last = max(early, default=-1)
    for number, row in zip(range(last + 1), read_pairs(tables, source), strict=False):
        if number in early:
            yield row
    for number, row in enumerate(read_pairs(tables, source)):
        if number not in early:
            yield row


def _ours(name: str) -> str:
    return OUR_NAMES.get(name, name)


def _checked(path: Path, columns: Sequence[str]) -> pq.ParquetFile:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    found = file.schema_arrow
    for name in columns:
        count = found.names.count(name)
        kind = found.field(name).type if count == 1 else "there twice" if count else "missing"
        if kind != _OURS.field(name).type:
            raise ArtifactError(
                f"{path}: column {name!r} is {kind}, expected "
                f"{_OURS.field(name).type}; --preferences takes preferences.parquet or "
                "pairs.parquet of a run"
            )
    return file


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where an export's files go, and how many shards they are spread over."""

    folder: Path
    counts: Counts
    pairs_per_shard: int

    def shards(self, end: str) -> list[Path]:
        """The shards' files, as the hub names them."""
        count = -(-self.counts.num_pairs // self.pairs_per_shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        return [self.folder / f"train-{n:05d}-of-{count:05d}.{end}" for n in range(count)]

    def chunks(self, items: Iterator[Row]) -> Iterator[Iterable[Row]]:
        """The items of one shard after the other."""
        while True:
            first = next(items, None)
            if first is None:
                return
            yield self._chunk(first, items)

    def _chunk(self, first: Row, items: Iterator[Row]) -> Iterator[Row]:
        yield first
        for _, item in zip(range(self.pairs_per_shard - 1), items, strict=False):
            yield item


def write_pickapic(job: Job, rows: Iterator[Row]) -> None:
    """Parquet shards in the columns of Pick-a-Pic v2."""
    found = (pickapic_row(row, n, job.counts) for n, row in enumerate(rows))
    _write_parquet(job, found, PICKAPIC)


def pickapic_row(row: Row, number: int, counts: Counts) -> Row:
    """A pair in Pick-a-Pic's columns; which image is 0 is a coin thrown by the pair's name.

    The images' uids are digests of their bytes. What never was (a time, URLs, a user) is null or 0.
    """
    images = [_bytes(row, "winner"), _bytes(row, "loser")]
    winner = hashlib.sha256(row["pair_id"].encode()).digest()[0] % 2
    if winner == 1:
        images.reverse()
    uids = [hashlib.sha256(image).hexdigest()[:32] for image in images]
    made_by = row["policy_digest"] or row["source"]
    return {
        "are_different": images[0] != images[1],
        "best_image_uid": uids[winner],
        "caption": row["prompt"],
        "created_at": None,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": None,
        "image_1_uid": uids[1],
        "image_1_url": None,
        "jpg_0": images[0],
        "jpg_1": images[1],
        "label_0": float(winner == 0),
        "label_1": float(winner == 1),
        "model_0": made_by,
        "model_1": made_by,
        "ranking_id": number,
        "user_id": 0,
        "num_example_per_prompt": counts.by_prompt[row["prompt_id"]],
        "__index_level_0__": number,
    }


def write_preference(job: Job, rows: Iterator[Row]) -> None:
    """Parquet shards with prompt, chosen, rejected and each pair's lineage."""
    names = PREFERENCE.arrow.names
    found = ({name: row[OUR_NAMES.get(name, name)] for name in names} for row in rows)
    _write_parquet(job, found, PREFERENCE.with_metadata({}))


def _write_parquet(job: Job, rows: Iterator[Row], layout: pa.Schema) -> None:
    for path, chunk in zip(job.shards("parquet"), job.chunks(rows), strict=True):
        with pq.ParquetWriter(path, layout, compression="zstd") as writer:
            group: list[Row] = []
            for row in chunk:
                group.append(row)
                if len(group) == ROWS_IN_MEMORY:
                    writer.write_table(pa.Table.from_pylist(group, schema=layout))
                    group = []
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema=layout))


def write_imagefolder(job: Job, rows: Iterator[Row]) -> None:
    """Image files, and one line a pair of metadata.jsonl."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for number, row in enumerate(rows):
            line = described(row)
            for ours, theirs in (("winner", "chosen"), ("loser", "rejected")):
                data = _bytes(row, ours)
                kind = image_kind(data, f"pair {row['pair_id']}, the {ours}")
                name = f"{number // FILES_PER_FOLDER:04d}/{number:06d}.{theirs}.{kind}"
                (job.folder / name).parent.mkdir(exist_ok=True)
                (job.folder / name).write_bytes(data)
                line[f"{theirs}_file_name"] = name
            metadata.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_webdataset(job: Job, rows: Iterator[Row]) -> None:
    """Tar shards with 000000.chosen.png, 000000.rejected.png and 000000.json of each pair.

    All images end as the first one does, whatever their kinds: `datasets` takes the columns from the
    first samples, and readers know an image by its bytes.
    """
    number, end = 0, ""
    for path, chunk in zip(job.shards("tar"), job.chunks(rows), strict=True):
        with tarfile.open(path, "w") as archive:
            for row in chunk:
                for ours, theirs in (("winner", "chosen"), ("loser", "rejected")):
                    data = _bytes(row, ours)
                    kind = image_kind(data, f"pair {row['pair_id']}, the {ours}")
                    end = end or kind
                    _add(archive, f"{number:06d}.{theirs}.{end}", data)
                text = json.dumps(described(row), ensure_ascii=False)
                _add(archive, f"{number:06d}.json", text.encode())
                number += 1


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # no time, no user: the same pairs make the same file
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def described(row: Row) -> Row:
    """What is known of a pair besides its images, by the names of `PREFERENCE`."""
    names = [name for name in PREFERENCE.arrow.names if PREFERENCE.arrow.field(name).type != IMAGE]
    return {name: row[OUR_NAMES.get(name, name)] for name in names}


def _bytes(row: Row, side: str) -> bytes:
    data = (row[side] or {}).get("bytes")
    if not data:
        raise ImageError(f"pair {row['pair_id']}: the {side} has no bytes; make its table anew")
    return bytes(data)


WRITERS: dict[Format, Callable[[Job, Iterator[Row]], None]] = {
    "pickapic": write_pickapic,
    "preference": write_preference,
    "imagefolder": write_imagefolder,
    "webdataset": write_webdataset,
}
"""How each format is written."""
