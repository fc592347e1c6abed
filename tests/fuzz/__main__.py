r"""Throw many random cases at every reader; write how they ended.

Example:
    python -m tests.fuzz --cases 10000 --output tests/fuzz/results.md
    python -m tests.fuzz --cases 500 --only labels
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from tests.fuzz.runner import Ending, fuzz
from tests.fuzz.targets import TARGETS

HEAD = """# Fuzzing: how {cases} random cases ended

    {command}

Of the readers of configs, prompts, labels, models, images and artifacts (`tests/fuzz/targets.py`), on two CPU
cores. A case ends in a result, in a clear error (a `UserError` that says what is wrong), or in a
traceback, which is a bug. A label that was guessed counts as a traceback too: of the tables with verdicts the
generator knows every winner.

| what is read | cases | results | clear errors | tracebacks | seconds |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Fuzz one target after the other and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=10_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other cases")
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--output", type=Path, help="where the table goes (Markdown)")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    targets = [target for target in TARGETS if args.only in target.name]
    lines, total = [], Ending()
    for number, target in enumerate(targets):
        cases = args.cases // len(targets) + (number < args.cases % len(targets))
        started = time.monotonic()
        ending = fuzz(target, cases, args.seed)
        total += ending
        lines.append(row(target.name, ending, time.monotonic() - started))
        print(lines[-1], flush=True)
    lines.append(row("all", total, total.seconds))
    print(lines[-1])
    for text in total.tracebacks:
        print(text, file=sys.stderr)
    if args.output is not None:
        command = f"python -m tests.fuzz --cases {args.cases} --seed {args.seed}"
        args.output.write_text(
            HEAD.format(cases=f"{args.cases:,}", command=command) + "\n".join(lines) + "\n"
        )
    raise SystemExit(bool(total.tracebacks))


def row(name: str, ending: Ending, seconds: float) -> str:
    """A line of the table."""
    counts = (ending.cases, ending.results, ending.errors, len(ending.tracebacks))
    return f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + f" | {seconds:.0f} |"


if __name__ == "__main__":
    main()
