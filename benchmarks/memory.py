r"""Memory of a training with few pairs and with many.

Example (two CPU cores, about half an hour; the sizes are in MB, so that they stand out from the model's):
    python -m benchmarks.memory --output benchmarks/memory.md

Each number of pairs is a process of its own: `stages.train_seed` on latents that were drawn at random, with a caption
for each pair. Every pair is trained on once. Anonymous memory is what the process must have; mapped files are
counted apart, for the kernel takes them back where memory is short.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from stages.core.artifacts.files import write_text
from stages.core.artifacts.schemas import PAIR_LATENTS, PREFERENCES
from stages.core.artifacts.tables import writing_table

MB = 2**20
POLL_SECONDS = 0.05
ROWS = 256
"""Pairs that are written at a time."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Memory of a training with few pairs and with many."""

    num_pairs: tuple[int, ...] = (1000, 16000)
    """Numbers of pairs, the fewest first."""
    batch_pairs: int = 64
    """Pairs of an optimizer step."""
    latents_channels: int = 64
    """Channels of an image's latents of 8 x 8; 64 make a quarter of SD1.5's bytes."""
    caption_width: int = 256
    """Numbers of each of a caption's 77 tokens; 768 is SD1.5."""
    folder: Path | None = None
    """Where the files go; they are removed. A temporary folder unless named."""
    output: Path = Path("benchmarks/memory.md")
    """Where the table goes (Markdown)."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One training."""

    num_pairs: int
    data_mb: float
    """Latents and conditionings of its pairs."""
    peak_mb: dict[str, float]
    """The most of anonymous memory and of all memory in use (RSS), from /proc every 50 ms."""
    seconds: float


def main(args: Args) -> None:
    """Measure each number of pairs and write the table."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        base = build(Path(folder), args.latents_channels, args.caption_width)
        found = [measure(base, Path(folder) / str(n), n, args) for n in args.num_pairs]
    first = found[0]
    lines = [
        f"Made by `python -m benchmarks.memory {shlex.join(sys.argv[1:])}`".rstrip()
        + ": `train_seed` on a tiny random "
        f"Stable Diffusion with latents of {args.latents_channels} x 8 x 8 and captions of 77 x "
        f"{args.caption_width}, a caption for each pair, one pass. Peaks of memory are of the whole process; ratios are to the first row.\n",
        "| pairs | latents and captions, MB | anonymous, MB | ratio | RSS, MB | ratio | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [
            cell
            for name in ("RssAnon", "VmRSS")
            for cell in (
                f"{row.peak_mb[name]:.0f}",
                f"{row.peak_mb[name] / first.peak_mb[name]:.3f}",
            )
        ]
        lines.append(
            f"| {row.num_pairs:,} | {row.data_mb:.0f} | {' | '.join(cells)} | {row.seconds:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    write_text(args.output, text)
    print(text)


def build(folder: Path, channels: int, width: int) -> Path:
    """A random model that computes little and whose captions are large, as FLUX.1's are beside its latents."""
    from tests import tiny_models

    base = tiny_models.sd15(folder)
    words = len(CLIPTokenizer.from_pretrained(base / "tokenizer"))
    text = tiny_models.text_config(words, width, width)
    text.num_hidden_layers = 1
    CLIPTextModel(text).save_pretrained(base / "text_encoder")
    UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
    ).save_pretrained(base / "unet")
    return base


def measure(base: Path, folder: Path, num_pairs: int, args: Args) -> Measured:
    """Train on so many pairs in a process of its own."""
    write_pairs(folder, num_pairs, args.latents_channels * 64)
    flags = {
        "preferences": folder / "preferences.parquet", "latents": folder / "latents.parquet",
        "model.base": base, "model.dtype": "float32", "lora.rank": 4,
        "settings.dpo-beta": 5000, "settings.learning-rate": 1e-5, "settings.batch-pairs": args.batch_pairs,
        "settings.passes": 1, "settings.warmup-share": 0, "settings.gradient-clip": 1,
        "settings.weight-decay": 0.01, "settings.caption-dropout": 0,
        "held-out.preferences": folder / "preferences.parquet", "held-out.latents": folder / "latents.parquet",
        "held-out.num-pairs": 0, "seed": 0, "output": folder / "policy", "training": folder / "training.parquet",
        "held-out-curve": folder / "curve.parquet", "work": folder / "work", "threads": 1,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    print("+", num_pairs, "pairs", file=sys.stderr)
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "stages.train_seed", *words])
    peaks: dict[str, float] = {}
    sizes: list[float] = []
    watch = threading.Thread(target=follow, args=(process, folder / "work", peaks, sizes))
    watch.start()
    process.wait()
    watch.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    return Measured(
        num_pairs=num_pairs,
        data_mb=max(sizes) / MB,
        peak_mb=peaks,
        seconds=time.monotonic() - started,
    )


def follow(
    process: subprocess.Popen[bytes], work: Path, peaks: dict[str, float], sizes: list[float]
) -> None:
    """Note the peaks of a process's memory, and the size of its encoded pairs, until it ends."""
    while process.poll() is None:
        for name, kilobytes in status(process.pid):
            peaks[name] = max(peaks.get(name, 0.0), kilobytes / 1024)
        files = list(work.rglob("*.safetensors"))
        sizes.append(sum(os.stat(file).st_size for file in files if file.exists()))
        time.sleep(POLL_SECONDS)


def status(pid: int) -> Iterator[tuple[str, int]]:
    """Kinds of memory of a process, in kilobytes; nothing when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmRSS"):
            yield name, int(value.split()[0])


def write_pairs(folder: Path, num_pairs: int, num_values: int) -> None:
    """Pairs of random latents, a caption for each; their images are empty, for nobody reads them."""
    random = np.random.default_rng(0)
    made_by: dict[str, Any] = {"stage": "import_preferences", "arguments": {}}
    with (
        writing_table(folder / "preferences.parquet", PREFERENCES, **made_by) as preferences,
        writing_table(folder / "latents.parquet", PAIR_LATENTS, **made_by) as latents,
    ):
        for start in range(0, num_pairs, ROWS):
            numbers = range(start, min(start + ROWS, num_pairs))
            preferences.write([human_pair(number) for number in numbers])
            columns: dict[str, pa.Array] = {"pair_id": pa.array([f"pair{n}" for n in numbers])}
            sizes = [[512, 512, 0, 0, 512, 512]] * len(numbers)
            for side in ("winner", "loser"):
                values = random.standard_normal(len(numbers) * num_values, np.float32)
                ends = pa.array(np.arange(len(numbers) + 1, dtype=np.int32) * num_values)
                columns[f"{side}_latents"] = pa.ListArray.from_arrays(ends, pa.array(values))
                kind = PAIR_LATENTS.arrow.field(f"{side}_geometry").type
                columns[f"{side}_geometry"] = pa.array(sizes, kind)
            latents.write(pa.table(columns))


def human_pair(number: int) -> dict[str, Any]:
    """A row of preferences."""
    image = {"bytes": b"", "path": None}
    return {
        **{field.name: None for field in PREFERENCES.arrow},
        "pair_id": f"pair{number}", "prompt_id": f"prompt{number}", "prompt": f"picture {number}",
        "winner": image, "loser": image, "source": "human", "iteration": 0,
    }  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
