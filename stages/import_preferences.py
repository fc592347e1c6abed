r"""Human preference pairs in the Pick-a-Pic v2 columns in; seed pairs and held-out pairs out.

Ties and unlabelled rows are dropped and counted. Training and held-out pairs share no prompt.

Example:
    python -m stages.import_preferences --files data/train-*.parquet --num-pairs 512 \\
        --num-holdout 200 --seed 0 --preferences preferences.parquet --holdout holdout.parquet \\
        --summary import.json
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from stages.core.artifacts import write_json, write_table
from stages.core.errors import UserError
from stages.core.images import ImageError, decode_image
from stages.core.prompts import normalise, prompt_id
from stages.core.runtime import log, progress, run_stage, stage
from stages.core.schemas import PREFERENCES
from stages.core.seeding import seed_of

TEXT_COLUMNS = ("caption", "label_0", "label_1")
IMAGE_COLUMNS = ("jpg_0", "jpg_1")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Human preference pairs in, checked seed pairs and held-out pairs out."""

    files: tuple[Path, ...]
    """Parquet files with the columns caption, jpg_0, jpg_1, label_0, label_1 (has_label)."""
    num_pairs: int | None
    """Seed pairs to keep; None keeps all that are not held out."""
    num_holdout: int
    """Pairs to hold out for measuring the reward's accuracy; their prompts are not trained on."""
    seed: int
    """Decides which prompts are held out and which pairs are kept."""
    preferences: Path
    """Where the seed pairs go (schema preferences)."""
    holdout: Path
    """Where the held-out pairs go (schema preferences)."""
    summary: Path
    """Where the counts go: rows read, dropped and kept (JSON)."""


@dataclass(frozen=True)
class Label:
    """One usable row, before its images are read."""

    file: Path
    row: int
    caption: str
    winner: Literal[0, 1]

    @property
    def pair_id(self) -> str:
        """Unique within a run."""
        return f"human-{self.file.stem}-{self.row:06d}"


def main(args: Args) -> None:
    """Read labels first, choose by prompt, then read only the chosen rows' images."""
    with stage("import_preferences") as run:
        check_names(args.files)
        counts = {"rows_read": 0, "unlabelled_dropped": 0, "ties_dropped": 0}
        labels = [label for file in args.files for label in read_labels(file, counts)]
        chosen, holdout = split(labels, args)
        run.rows_in = counts["rows_read"]
        by_file: dict[Path, set[int]] = defaultdict(set)
        for label in (*chosen, *holdout):
            by_file[label.file].add(label.row)
        images = {
            (file, row): pair
            for file in progress(sorted(by_file), "reading images", "files")
            for row, pair in read_images(file, by_file[file])
        }
        for path, part in ((args.preferences, chosen), (args.holdout, holdout)):
            rows = [to_row(label, images[label.file, label.row]) for label in part]
            write_table(
                path, rows, PREFERENCES,
                stage="import_preferences", arguments=args, inputs=args.files,
            )  # fmt: skip
            run.rows_out += len(rows)
        counts |= {
            "pairs_kept": len(chosen),
            "pairs_held_out": len(holdout),
            "pairs_left_over": len(labels) - len(chosen) - len(holdout),
            "prompts_kept": len({prompt_id(label.caption) for label in chosen}),
            "prompts_held_out": len({prompt_id(label.caption) for label in holdout}),
        }
        log.info("import_preferences: %s", ", ".join(f"{k} {v}" for k, v in counts.items()))
        write_json(args.summary, counts)


def check_names(files: tuple[Path, ...]) -> None:
    """UserError if two files have one name, from which the names of their pairs come."""
    for name, count in Counter(file.stem for file in files).items():
        if count > 1:
            raise UserError(
                f"{count} of the files are called {name!r}; the pairs are named after their file. "
                "Give each file once, under a name of its own."
            )


def read_labels(file: Path, counts: dict[str, int]) -> Iterator[Label]:
    """The file's rows with a winner; ties and unlabelled rows are counted and left out.

    UserError names the file and row of a caption or label that cannot be used.
    """
    parquet = open_checked(file)
    has_flag = "has_label" in parquet.schema_arrow.names
    columns = [*TEXT_COLUMNS, *(["has_label"] if has_flag else [])]
    row = -1
    for batch in parquet.iter_batches(columns=columns, batch_size=4096):
        for values in batch.to_pylist():
            row += 1
            counts["rows_read"] += 1
            if has_flag and values["has_label"] is False:
                counts["unlabelled_dropped"] += 1
                continue
            caption, label = values["caption"], (values["label_0"], values["label_1"])
            if not isinstance(caption, str) or not normalise(caption):
                found = {None: "null", "": "empty"}.get(caption, f"{caption!r}")
                raise UserError(
                    f"{file}, row {row}: the caption is {found}; every pair needs its prompt. "
                    "Fill it in or remove the row."
                )
            if label == (0.5, 0.5):
                counts["ties_dropped"] += 1
                continue
            if label not in ((1, 0), (0, 1)):
                raise UserError(
                    f"{file}, row {row}: label_0, label_1 = {label[0]}, {label[1]}; expected "
                    "1, 0 (image 0 wins), 0, 1 (image 1 wins) or 0.5, 0.5 (a tie)"
                )
            yield Label(file, row, caption, 0 if label[0] == 1 else 1)


def open_checked(file: Path) -> pq.ParquetFile:
    """The file, known to have the columns we need. UserError names a missing one."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; preferences.files must name Parquet files")
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} is no readable Parquet file: {error}") from error
    names = parquet.schema_arrow.names
    missing = [name for name in (*TEXT_COLUMNS, *IMAGE_COLUMNS) if name not in names]
    if missing:
        raise UserError(
            f"{file} has no column {', '.join(map(repr, missing))} (found: {', '.join(names)}); "
            "expected the Pick-a-Pic v2 columns caption, jpg_0, jpg_1, label_0, label_1"
        )
    return parquet


def split(labels: list[Label], args: Args) -> tuple[list[Label], list[Label]]:
    """(seed pairs, held-out pairs), whole prompts at a time, in an order the seed decides.

    UserError if there are fewer than two usable pairs, or fewer than asked for.
    """
    by_prompt: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_prompt[prompt_id(label.caption)].append(label)
    order = sorted(by_prompt, key=lambda name: (seed_of(args.seed, "import", name), name))
    holdout: list[Label] = []
    while len(holdout) < args.num_holdout and order:
        holdout.extend(by_prompt[order.pop(0)])
    holdout = holdout[: args.num_holdout]
    chosen = [label for name in order for label in by_prompt[name]]
    wanted = len(chosen) if args.num_pairs is None else args.num_pairs
    if len(chosen) < max(2, wanted):
        raise UserError(
            f"{', '.join(map(str, args.files))}: {len(labels)} usable pairs, of which "
            f"{len(holdout)} are held out and {len(chosen)} are left; {max(2, wanted)} seed pairs "
            "are needed. Give more labels, or lower preferences.num_pairs or num_holdout."
        )
    return chosen[:wanted], holdout


def read_images(file: Path, rows: set[int]) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
    """(row, (jpg_0, jpg_1)) of the wanted rows. UserError names the row of a broken image."""
    start = 0
    for batch in open_checked(file).iter_batches(columns=list(IMAGE_COLUMNS), batch_size=64):
        for row in range(start, start + len(batch)):
            if row not in rows:
                continue
            pair = []
            for name in IMAGE_COLUMNS:
                value: Any = batch.column(name)[row - start].as_py()
                data: Any = value.get("bytes") if isinstance(value, dict) else value
                try:
                    decode_image(data if isinstance(data, bytes) else None)
                except ImageError as error:
                    raise UserError(
                        f"{file}, row {row}, column {name!r}: {error}. Repair or remove the row."
                    ) from error
                pair.append(data)
            yield row, (pair[0], pair[1])
        start += len(batch)


def to_row(label: Label, images: tuple[bytes, bytes]) -> dict[str, object]:
    """The pair as a row of a preferences table."""
    image = [{"bytes": data, "path": None} for data in images]
    return {
        "pair_id": label.pair_id,
        "prompt_id": prompt_id(label.caption),
        "prompt": label.caption,
        "winner": image[label.winner],
        "loser": image[1 - label.winner],
        "source": "human",
        "iteration": 0,
        "source_file": str(label.file),
        "source_row": label.row,
    }


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
