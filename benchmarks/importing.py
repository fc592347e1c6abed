"""Peak memory and seconds per GB of importing Pick-a-Pic shards, beside pandas reading the same files.

Example:
    python -m benchmarks.importing --output benchmarks/importing.md

Shards are synthetic: Pick-a-Pic's columns and row groups of 1,000 rows, JPEG files of about 168 kB, no
two alike. Every row of the table is a process of its own.
"""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image

from stages.core.artifacts.files import write_text
from stages.core.artifacts.schemas import PICKAPIC

GB = 1e9
IMAGE_BYTES = 168_000
ROWS_PER_GROUP = 1000
LOOKS = 32
"""Different pictures; a tail after each JPEG file's end makes every image a file of its own."""

PANDAS = """
import pandas as pd, sys
table = pd.concat([pd.read_parquet(file) for file in sys.argv[3:]], ignore_index=True)
table = table[table.label_0 != 0.5].sample(frac=1, random_state=0)
table.head(int(sys.argv[2])).to_parquet(sys.argv[1])
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Peak memory and seconds per GB of importing Pick-a-Pic shards."""

    gigabytes: float = 2.0
    """Size of all shards together."""
    shards: int = 4
    """How many there are."""
    output: Path = Path("benchmarks/importing.md")
    """Where the table goes (Markdown)."""


@dataclass(frozen=True)
class Measured:
    """What a process took."""

    seconds: float
    peak_bytes: float


def main(args: Args) -> None:
    """Write shards, import few and all of their pairs, let pandas do the same, write the table."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        rows = int(args.gigabytes * GB / (2 * IMAGE_BYTES))
        writing = get_context("spawn").Process(
            target=write_shards, args=(folder, rows, args.shards)
        )
        writing.start()  # a process of its own: a child's peak begins at its parent's
        writing.join()
        files = sorted(folder.glob("train-*.parquet"))
        size = sum(file.stat().st_size for file in files) / GB
        few, most = rows // 20, int(0.8 * rows)
        lines = []
        for number in (few, most):
            ours, pandas = import_pairs(folder, number), read_by_pandas(files, number, folder)
            for what, measured in (("import_preferences", ours), ("pandas, all at once", pandas)):
                lines.append(
                    f"| {number:,} of {rows:,} | {what} | {measured.seconds:.1f} "
                    f"| {measured.seconds / size:.1f} | {measured.peak_bytes / GB:.2f} |"
                )
    head = (
        f"Made by `python -m benchmarks.importing --gigabytes {args.gigabytes:g} --shards "
        f"{args.shards}` on {os.cpu_count()} {platform.machine()} CPU cores; {args.shards} shards of "
        f"{size / args.shards:.2f} GB. `import_preferences` also decodes and checks every chosen image, "
        "which pandas does not; memory is the peak of the whole process.\n"
    )
    table = ["| pairs chosen | by | seconds | seconds per GB read | peak GB |",
             "|---|---|---|---|---|", *lines]  # fmt: skip
    write_text(args.output, "\n".join(["# Importing", "", head, *table, ""]))
    print(args.output.read_text())


def write_shards(folder: Path, rows: int, num_shards: int) -> None:
    """Parquet files in Pick-a-Pic's columns."""
    looks = [jpeg(number) for number in range(LOOKS)]
    for shard, numbers in enumerate(np.array_split(np.arange(rows), num_shards)):
        path = folder / f"train-{shard:05d}-of-{num_shards:05d}.parquet"
        with pq.ParquetWriter(path, PICKAPIC) as writer:
            for start in range(0, len(numbers), ROWS_PER_GROUP):
                some = numbers[start : start + ROWS_PER_GROUP].tolist()
                table = pa.Table.from_pylist(
                    [to_row(number, looks) for number in some], schema=PICKAPIC
                )
                writer.write_table(table, row_group_size=ROWS_PER_GROUP)


def jpeg(number: int) -> bytes:
    """A JPEG file of about `IMAGE_BYTES`: coarse and fine noise, 768 x 768."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8))
    fine = rng.normal(0, 14, (768, 768, 1))
    pixels = np.asarray(coarse.resize((768, 768), Image.Resampling.BICUBIC)) + fine
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=75)
    data = buffer.getvalue()
    return data + bytes(max(0, IMAGE_BYTES - len(data)))


def to_row(number: int, looks: Sequence[bytes]) -> dict[str, object]:
    """One row; an eighth are ties, and about 16 rows share a caption, as in Pick-a-Pic."""
    label = (0.0, 1.0)[number % 2] if number % 8 else 0.5
    images = [
        looks[(2 * number + side) % LOOKS] + b"%012d" % (2 * number + side) for side in (0, 1)
    ]
    return {
        "caption": f"caption number {number * 7919 % 100_003 // 16}",
        "has_label": True,
        **{f"image_{side}_uid": f"uid-{2 * number + side}" for side in (0, 1)},
        **{f"jpg_{side}": images[side] for side in (0, 1)},
        "label_0": label, "label_1": 1 - label, "ranking_id": number,
    }  # fmt: skip


def import_pairs(folder: Path, number: int) -> Measured:
    """The import of so many pairs, as the workflow calls it."""
    out = folder / f"out-{number}"
    return measure(
        sys.executable, "-m", "stages.import_preferences", "--files", f"{folder}/train-*.parquet",
        "--num-pairs", str(number), "--num-holdout", "50", "--seed", "0",
        "--preferences", f"{out}/preferences.parquet", "--holdout", f"{out}/holdout.parquet",
        "--summary", f"{out}/import.json",
    )  # fmt: skip


def read_by_pandas(files: Sequence[Path], number: int, folder: Path) -> Measured:
    """The plain way: read everything, drop ties, shuffle, keep the first, write."""
    words = [f"{folder}/pandas.parquet", str(number), *map(str, files)]
    return measure(sys.executable, "-c", PANDAS, *words)


def measure(*command: str) -> Measured:
    """Run a command to its end. RuntimeError if it fails."""
    started = time.monotonic()
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _pid, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command} ended with {child.returncode}")
    return Measured(time.monotonic() - started, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
