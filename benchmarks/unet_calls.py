r"""What makes one call of the denoiser faster: a CUDA graph, torch.compile, another memory layout.

Example (a GPU is needed):
    python -m benchmarks.unet_calls --family sd15 --rows 16 64 --output benchmarks/unet-calls.md

Random weights: speed does not depend on them. Every arm is compared with plain calls of the same
network on the same input.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.inference import PROMPT, matrix_rate, row_operations
from benchmarks.training import build
from stages.core.artifacts.files import write_text
from stages.core.method.noising import generator
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings

Kind = Literal["eager", "graph", "blocks", "compiled", "compiled, channels last"]
KINDS: tuple[Kind, ...] = ("eager", "graph", "blocks", "compiled", "compiled, channels last")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Time of a denoiser's call, plain and made faster."""

    family: Literal["sd15", "sdxl"] = "sd15"
    """Architecture."""
    shapes: Literal["tiny", "real"] = "real"
    """'real' is the published architecture."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision."""
    rows: tuple[int, ...] = (16, 40)
    """Batch sizes."""
    kinds: tuple[Kind, ...] = KINDS
    """Which ways; 'blocks' compiles the repeated transformer blocks alone."""
    repeats: int = 10
    """Calls that are timed, after three that are not."""
    output: Path = Path("benchmarks/unet-calls.md")
    """Where the table goes (Markdown)."""


def main(args: Args) -> None:
    """Measure each kind at each number of rows."""
    device = torch.device("cuda")
    rate = matrix_rate(device, getattr(torch, args.dtype))
    lines = [
        f"{args.family}, {args.shapes} shapes, {args.dtype}, {torch.cuda.get_device_name()}, torch "
        f"{torch.__version__}, {rate / 1e12:.0f} TFLOP/s in matrix products.\n",
        "| rows | way | first call, s | ms a call | share of the rate | apart from eager |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        base = build(args.family, args.shapes, Path(folder))
        model = load_model(ModelSettings(base=str(base), dtype=args.dtype), device=device)
        operations = row_operations(model)
        for kind in args.kinds:
            denoiser = model.load_denoiser()
            for rows in args.rows:
                calls = Calls(model, denoiser, rows)
                expected = (
                    model.predict(model.load_denoiser(), *calls.inputs) if kind != "eager" else None
                )
                try:
                    first, seconds, found = calls.timed(kind, args.repeats)
                except Exception as error:
                    lines.append(
                        f"| {rows} | {kind} | failed: {type(error).__name__}: {error!s:.200} |"
                    )
                    print(lines[-1], flush=True)
                    break
                apart = (
                    0.0
                    if expected is None
                    else float((found - expected).float().norm() / expected.float().norm())
                )
                lines.append(
                    f"| {rows} | {kind} | {first:.1f} | {1e3 * seconds:.1f} | "
                    f"{rows * operations / seconds / rate:.2f} | {apart:.1e} |"
                )
                print(lines[-1], flush=True)
            torch._dynamo.reset()
    write_text(args.output, "\n".join(lines) + "\n")


class Calls:
    """Calls of one denoiser on one batch."""

    def __init__(self, model: DiffusionModel, denoiser: Denoiser, rows: int) -> None:
        self.model, self.denoiser = model, denoiser
        latents = torch.randn((rows, *model.latents_shape), generator=generator(rows))
        self.inputs: tuple[Any, ...] = (
            latents.to(model.device, model.dtype),
            torch.full((rows,), 500, device=model.device),
            model.encode_text([PROMPT]).repeat(rows),
        )

    @torch.no_grad()
    def timed(self, kind: Kind, repeats: int) -> tuple[float, float, torch.Tensor]:
        """(seconds of the first call, median of later ones, the prediction)."""
        network: Any = self.denoiser.network
        if "channels last" in kind:
            network.to(memory_format=torch.channels_last)
        if kind.startswith("compiled"):
            network.compile(dynamic=False)
        elif kind == "blocks":
            network.compile_repeated_blocks(fullgraph=True, dynamic=False)
        started = time.monotonic()
        call = self._graph() if kind == "graph" else self._predict
        call()
        torch.cuda.synchronize()
        first = time.monotonic() - started
        for _ in range(2):
            call()
        taken = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            started = time.monotonic()
            found = call()
            torch.cuda.synchronize()
            taken.append(time.monotonic() - started)
        return first, statistics.median(taken), found

    def _predict(self) -> torch.Tensor:
        return self.model.predict(self.denoiser, *self.inputs)

    def _graph(self) -> Callable[[], torch.Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._predict()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = self._predict()

        def replay() -> torch.Tensor:
            graph.replay()
            return found

        return replay


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
