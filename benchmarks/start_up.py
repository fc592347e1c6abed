"""CPU seconds from a stage's start to its `main`: mostly imports, and a run starts dozens of stages.

Example:
    python -m benchmarks.start_up --beside ../before --output benchmarks/start_up.md

Measured is `python -m stages.NAME --help`, with its exit. Stages and checkouts take turns, so that other
work on the machine reaches all of them; of each the least is reported. The bare imports say how much of
it belongs to the libraries that a stage with a network cannot do without.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.artifacts.files import write_text

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_MAIN = {"__init__", "launch"}
LIBRARIES = {
    "torch": "import torch",
    "torch._dynamo (diffusers imports it)": "import torch._dynamo",
    "transformers' CLIP": "from transformers import CLIPTextModel",
    "diffusers' UNet": "from diffusers import UNet2DConditionModel",
    "the same, no garbage collected": "import gc; gc.disable(); "
    "from diffusers import UNet2DConditionModel; gc.freeze()",
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """CPU seconds from a stage's start to its `main`."""

    rounds: int = 5
    """How often each is started."""
    beside: Path | None = None
    """Another checkout, to compare with."""
    output: Path = Path("benchmarks/start_up.md")
    """Where the table goes (Markdown)."""


def main(args: Args) -> None:
    """Start every stage of this checkout, and of the other one, some rounds; write the table."""
    names = sorted({path.stem for path in (ROOT / "stages").glob("*.py")} - WITHOUT_MAIN)
    places = [ROOT] if args.beside is None else [args.beside.resolve(), ROOT]
    found: dict[tuple[str, Path], list[float]] = {}
    for _ in range(args.rounds):
        for name in names:
            for place in (each for each in places if has(each, name)):
                words = ("-m", f"stages.{name}", "--help")
                found.setdefault((name, place), []).append(cpu_seconds(words, place))
        for name, code in LIBRARIES.items():
            found.setdefault((name, ROOT), []).append(cpu_seconds(("-c", code), ROOT))
    heads = ["this commit"] if args.beside is None else ["before", "this commit"]
    lines = [f"| start of | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in sorted(names, key=lambda name: -min(found[name, ROOT])):
        cells = [f"{min(found[name, place]):.2f}" if has(place, name) else "-" for place in places]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    bare = [f"| {name} | {min(found[name, ROOT]):.2f} |" for name in LIBRARIES]
    text = [
        "# Starting a stage", "",
        f"CPU seconds (user and system), the least of {args.rounds}; made by `python -m "
        f"benchmarks.start_up` on {os.cpu_count()} shared {platform.machine()} cores.", "",
        *lines, "", "| bare import | CPU seconds |", "|---|---|", *bare, "",
    ]  # fmt: skip
    write_text(args.output, "\n".join(text))
    print(args.output.read_text())


def has(place: Path, name: str) -> bool:
    """Whether a checkout has a stage of this name."""
    return (place / "stages" / f"{name}.py").is_file()


def cpu_seconds(words: Sequence[str], folder: Path) -> float:
    """What a Python that is started in a folder takes to its end. RuntimeError if it fails."""
    child = subprocess.Popen(
        [sys.executable, *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _pid, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"python {' '.join(words)} ended with {child.returncode}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
