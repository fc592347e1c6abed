"""Images a second of each metric network: in batches, against one image at a time in the same run.

Example (small random networks in the published files' layouts; the real ones need their weights):
    python -m benchmarks.scorers --output benchmarks/scorers.md

The loop is what a plain script does: one call for each image with its prompt, so that nothing is
shared between images.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from stages.core.artifacts.files import write_text
from stages.metrics import NETWORKS, load_scorer, score_in_batches
from tests.metrics.conftest import publish


@dataclass(frozen=True, kw_only=True)
class Args:
    """Images a second of each metric network."""

    images: int = 128
    """Pictures to score, four of each prompt."""
    side: int = 512
    """Height and width of a picture, in pixels."""
    images_per_batch: int = 64
    """Pictures that are scored together."""
    threads: int = 2
    """CPU threads."""
    output: Path = Path("benchmarks/scorers.md")
    """Where the table goes (Markdown)."""


def main(args: Args) -> None:
    """Time both ways on the same pictures, each after a call that is not timed."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (args.images, args.side, args.side, 3), np.uint8))
    prompts = [f"a picture of thing number {number // 4}" for number in range(args.images)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        published = publish(Path(folder))
        for name in NETWORKS:
            loop, batched = (load_scorer(name, published.options(name), device) for _ in range(2))

            def one_by_one(scorer=loop) -> list[float]:  # type: ignore[no-untyped-def]
                pairs = zip(pictures, prompts, strict=True)
                return [float(scorer(images=i[None], prompts=[p])[0]) for i, p in pairs]

            def in_batches(scorer=batched) -> list[float]:  # type: ignore[no-untyped-def]
                return score_in_batches(scorer, pictures, prompts, args.images_per_batch)

            slow, alone = timed(one_by_one)
            fast, together = timed(in_batches)
            assert np.allclose(alone, together, rtol=1e-4, atol=1e-4), name
            rates = args.images / slow, args.images / fast
            rows.append(f"| {name} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} |")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else (
        f"{platform.machine()} CPU, {args.threads} threads")  # fmt: skip
    lines = [
        f"Made by `python -m benchmarks.scorers --output {args.output}` on {machine}: {args.images} "
        f"pictures of {args.side} x {args.side}, small random networks in the published layouts (at "
        "real size the network, not reading the picture, takes most of the time).\n",
        "| metric | one at a time, images/s | batches, images/s | ratio |",
        "|---|---|---|---|",
        *rows,
    ]
    write_text(args.output, "\n".join(lines) + "\n")
    print("\n".join(lines))


def timed(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Seconds of the second of two calls, and what it returned."""
    work()
    started = time.monotonic()
    found = work()
    return time.monotonic() - started, found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
