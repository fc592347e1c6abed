"""Run the smallest DAG, `kill -9` in it at random moments, run it again; the results must not differ.

One unbroken run says what must come out. Then, in another folder, the same config is run while a
stage, the whole process group, or Snakemake alone is killed, and is started again by the same
command until it is done; every file is compared bit for bit, and it begins anew. Stop it at any time:
the same command continues. Example (80 minutes on two CPU cores):
    python -m tests.chaos --kills 500 --seed 0 --output tests/chaos/results.md
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.artifacts.files import write_text
from tests.chaos.harness import KINDS, Harness, Tally


@dataclass(frozen=True, kw_only=True)
class Args:
    """Kill a run at random moments, run it again; the results must not differ."""

    kills: int = 25
    """How many times `kill -9`."""
    seed: int = 0
    """Decides when and what is killed; the moment in the run differs with the machine's speed."""
    mean_seconds: float = 8.0
    """Between two kills, on average; the time is exponentially distributed."""
    folder: Path = Path("work/chaos")
    """Where it runs, and where it keeps count; delete it to start over."""
    output: Path | None = None
    """Where the table goes (Markdown), besides the terminal."""


def main(args: Args) -> None:
    """Kill, compare, and print the table; exit code 1 if anything was lost."""
    folder = args.folder.resolve() / f"seed-{args.seed}"
    tally = Harness(folder, seed=args.seed, mean_seconds=args.mean_seconds).run(args.kills)
    text = table(args, tally)
    if args.output is not None:
        write_text(args.output, text)
    print(text)
    raise SystemExit(1 if tally.losses else 0)


def table(args: Args, tally: Tally) -> str:
    """Everything that was counted."""
    command = (
        f"python -m tests.chaos --kills {args.kills} --mean-seconds {args.mean_seconds:g}"
        f" --seed {args.seed}"
    )
    kinds = Counter(kill["kind"] for kill in tally.kills)
    rows = [
        ("kills (`kill -9`)", len(tally.kills)),
        *zip(("of one stage", "of the whole process group", "of Snakemake alone"),
             (kinds[kind] for kind in KINDS), strict=True),
        ("starts of Snakemake, all by the same command", tally.starts),
        ("trainings that continued from a saved state", tally.resumed),
        ("runs that came to their end and were compared", tally.completed),
        ("files compared in each, bit for bit", tally.files),
        ("seconds", round(tally.seconds)),
        ("**losses** (files that differ, failures without a kill, processes left)",
         f"**{len(tally.losses)}**"),
    ]  # fmt: skip
    lines = [f"Made by `{command}` with `tests/chaos/config.yaml`.\n", "| | |", "|---|---|"]
    lines += [f"| {what} | {count} |" for what, count in rows]
    lines += [
        "",
        "| stage | killed alone | at work when all or Snakemake was killed |",
        "|---|---|---|",
    ]
    alone = Counter(
        name for kill in tally.kills if kill["kind"] == "stage" for name in kill["stages"]
    )
    other = Counter(
        name for kill in tally.kills if kill["kind"] != "stage" for name in kill["stages"]
    )
    for name in sorted(alone.keys() | other.keys()):
        lines.append(f"| {name} | {alone[name]} | {other[name]} |")
    idle = sum(not kill["stages"] for kill in tally.kills)
    lines.append(f"| none: Snakemake was starting, planning or ending | 0 | {idle} |")
    lines += [f"\nLost: {loss}" for loss in tally.losses]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
