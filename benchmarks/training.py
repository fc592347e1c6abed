"""Seconds a step and peak memory of a DPO training: full and LoRA, whole batches and micro-batches.

Example (tiny random models of the real architectures on the CPU; the real shapes need a GPU):
    python -m benchmarks.training --output benchmarks/training.md
    python -m benchmarks.training --shapes real --output benchmarks/training-gpu.md

On a CPU each row is a process of its own; on a GPU, which keeps its own account of memory, the rows of a
family share one. Ratios are to the first row of its family, the plain full fine-tune. Weights are
random: neither speed nor memory depends on them.
"""

from __future__ import annotations

import gc
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from stages.core.artifacts.files import write_text
from stages.core.models.denoiser import LoraSettings
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.encoding import EncodedPairs, encode_captions
from stages.core.training.loop import Training
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings
from tests import flow_models, tiny_models

FamilyName = Literal["sd15", "sdxl", "sd35-medium", "sd35-large", "flux"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train."""

    family: FamilyName
    lora_rank: int
    micro_batch_pairs: int
    gradient_checkpointing: bool

    @property
    def name(self) -> str:
        """In words."""
        kind = f"LoRA {self.lora_rank}" if self.lora_rank else "full"
        saving = ", checkpointing" if self.gradient_checkpointing else ""
        return f"{kind}, {self.micro_batch_pairs} pairs at once{saving}"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Seconds a step and peak memory of a DPO training."""

    shapes: Literal["tiny", "real"] = "tiny"
    """'real' is the published architectures in bfloat16, which need a GPU."""
    batch_pairs: int = 8
    """Pairs of one optimizer step."""
    steps: int = 4
    """Steps that are timed, after one that is not."""
    families: tuple[FamilyName, ...] = ("sd15", "sdxl")
    """Architectures."""
    ranks: tuple[int, ...] = (0, 16)
    """Of the LoRA; 0 is a full fine-tune."""
    pairs_at_once: tuple[int, ...] = (8, 2)
    """Pairs of a micro-batch."""
    checkpointing: tuple[bool, ...] = (False, True)
    """Whether activations are computed again."""
    models: Path | None = None
    """Folder where the random models are kept for another call; none throws them away."""
    output: Path = Path("benchmarks/training.md")
    """Where the table goes (Markdown)."""


def main(args: Args) -> None:
    """Measure every row in a process of its own, then write the table."""
    rows = [
        Row(family=family, lora_rank=rank, micro_batch_pairs=micro, gradient_checkpointing=saving)
        for family in args.families
        for rank in args.ranks
        for micro in args.pairs_at_once
        for saving in args.checkpointing
    ]
    with tempfile.TemporaryDirectory() as folder:
        where = args.models or Path(folder)
        bases = {family: build(family, args.shapes, where) for family in args.families}
        measured = [
            pair for group in groups(rows) for pair in measure(group, bases[group[0].family], args)
        ]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        f"{platform.machine()} CPU, one thread")  # fmt: skip
    command = f"python -m benchmarks.training {' '.join(sys.argv[1:])}"
    lines = [
        f"Made by `{command}` on {machine}; {args.batch_pairs} pairs a step, AdamW, {args.shapes} "
        "shapes, random weights. Memory is the peak of the process (CPU) or of the device (GPU), and "
        "holds the model itself.\n",
        "| family | training | s a step | ratio | peak GB | ratio |",
        "|---|---|---|---|---|---|",
    ]
    plain: dict[str, dict[str, float]] = {}
    for row, found in measured:
        first = plain.setdefault(row.family, found)
        if not found:
            lines.append(f"| {row.family} | {row.name} | does not fit | - | - | - |")
            continue
        lines.append(
            f"| {row.family} | {row.name} | {found['seconds']:.3f} | "
            f"{found['seconds'] / first['seconds']:.2f} | {found['gb']:.2f} | "
            f"{found['gb'] / first['gb']:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    write_text(args.output, text)
    print(text)


def build(family: FamilyName, shapes: str, folder: Path) -> Path:
    """A random model in diffusers' layout, which is found again if it was made here before."""
    made = folder / f"{shapes}-{family}.txt"
    if made.exists():
        return Path(made.read_text())
    real: dict[FamilyName, Callable[[Path], Path]] = {
        "sd15": tiny_models.real_sd15,
        "sdxl": tiny_models.real_sdxl,
        "sd35-medium": partial(flow_models.real_sd35, transformer=flow_models.SD35_MEDIUM),
        "sd35-large": partial(flow_models.real_sd35, transformer=flow_models.SD35_LARGE),
        "flux": flow_models.real_flux,
    }
    tiny: dict[FamilyName, Callable[[Path], Path]] = {
        "sd15": tiny_models.sd15,
        "sdxl": tiny_models.sdxl,
        "sd35-medium": flow_models.sd3,
        "sd35-large": flow_models.sd3,
        "flux": flow_models.flux,
    }
    base = (real if shapes == "real" else tiny)[family](folder / family)
    write_text(made, str(base))
    return base


def groups(rows: list[Row]) -> list[list[Row]]:
    """Rows that are measured in one process."""
    if not torch.cuda.is_available():
        return [[row] for row in rows]
    families = dict.fromkeys(row.family for row in rows)
    return [[row for row in rows if row.family == family] for family in families]


def measure(rows: list[Row], base: Path, args: Args) -> list[tuple[Row, dict[str, float]]]:
    """Seconds a step and gigabytes of each row, from a fresh process; nothing where it does not fit."""
    job = json.dumps({"rows": [asdict(row) for row in rows], "base": str(base), "args": {
        "shapes": args.shapes, "batch_pairs": args.batch_pairs, "steps": args.steps}})  # fmt: skip
    print("+", rows[0].family, ", ".join(row.name for row in rows), file=sys.stderr)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", "--child", job],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return list(zip(rows, json.loads(done.stdout.splitlines()[-1]), strict=True))


def children(job: dict[str, Any]) -> list[dict[str, float]]:
    """Train a few steps of each row in this process."""
    found = []
    for row in job["rows"]:
        try:
            found.append(child({**job, "row": row}))
        except torch.cuda.OutOfMemoryError:
            found.append({})
        print(row, found[-1], file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
    return found


def child(job: dict[str, Any]) -> dict[str, float]:
    """Train a few steps in this process."""
    row, args = Row(**job["row"]), Args(**job["args"])
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: Any = "bfloat16" if args.shapes == "real" else "float32"
    model = load_model(ModelSettings(base=job["base"], dtype=dtype), device=device)
    count = args.batch_pairs
    latents = torch.randn((2, count, *model.latents_shape))
    pairs = EncodedPairs(
        winner=latents[0],
        loser=latents[1],
        caption=torch.zeros(count, dtype=torch.int64),
        text=encode_captions(model, ["a cat", ""]),
        winner_geometry=model.native_geometry(count),
        loser_geometry=model.native_geometry(count),
    )
    model.release(*model.encoder_parts)
    settings = TrainingSettings(
        dpo_beta=5000.0, learning_rate=1e-8, batch_pairs=count, passes=1.0, warmup_share=0.0,
        gradient_clip=1.0, weight_decay=0.01, caption_dropout=0.0,
    )  # fmt: skip
    lora = LoraSettings(rank=row.lora_rank, alpha=16.0)
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    how = Execution(
        micro_batch_pairs=row.micro_batch_pairs,
        gradient_checkpointing=row.gradient_checkpointing,
        save_minutes=10**9,
    )

    def train(passes: float) -> float:
        started = time.monotonic()
        Training(
            model, policy, reference, pairs, replace(settings, passes=passes), seed=0,
            work=Path(tempfile.gettempdir()) / "unused", identity="", processes=Processes(device),
            execution=how,
        ).run()  # fmt: skip
        return time.monotonic() - started

    train(1.0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = train(float(args.steps)) / args.steps
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": taken, "gb": peak / 1e9}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(children(json.loads(sys.argv[2]))))
    else:
        main(tyro.cli(Args, description=__doc__))
