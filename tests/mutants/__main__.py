"""Put single wrong lines into a copy of the tree, one at a time, and see whether the tests notice.

Example (about half an hour on two CPU cores):
    python -m tests.mutants --output tests/mutants/results.md

The tests of the file run first, then those of its room; if they pass, all of tests/core and tests/stages that is not
slow does. A mutant that passes all of them has survived; one that is argued to change nothing is not tried
by the last. With `--answers` what was noticed is kept, and
is tried again only where the file has changed; `--quick` leaves out the second part and writes no table.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import tyro

from stages.core.artifacts.files import write_text
from tests.mutants.lines import MUTANTS, Mutant
from tests.mutants.warm import run_pytest

ROOT = Path(__file__).resolve().parents[2]
FIRST = {
    "method": "tests/core/test_objective.py tests/core/test_rewards.py "
    "tests/core/test_noising.py tests/core/test_selection.py tests/core/test_mixing.py "
    "tests/core/test_scoring.py tests/core/test_sampling.py tests/core/test_derivative.py "
    "tests/core/test_allocation.py tests/core/test_calibration.py tests/core/test_listwise.py "
    "tests/core/test_online_objective.py tests/core/test_trajectories.py "
    "tests/core/test_noticed.py",
    "models": "tests/core/test_sampling.py tests/core/test_scoring.py tests/core/test_flow.py",
    "training": "tests/core/test_early_stopping.py tests/core/test_stopping.py "
    "tests/core/test_noticed.py tests/core/test_training.py",
    "evaluation": "tests/core/test_statistics.py tests/core/test_noticed.py tests/core/test_guards.py "
    "tests/core/test_gates.py tests/core/test_page.py tests/stages/test_gates.py tests/stages/test_evaluation.py",
}
OWN = {
    "method/adaptive.py": "tests/stages/test_draws.py",
    "method/secant.py": "tests/core/test_derivative.py",
    "method/gaussian_steps.py": "tests/core/test_trajectories.py tests/core/test_flow_steps.py",
    "models/interface.py": "tests/core/test_sampling.py",
    "training/pair_losses.py": "tests/core/test_training.py tests/core/test_flow.py",
    "training/loop.py": "tests/core/test_noticed.py tests/core/test_training.py",
    "training/held_out.py": "tests/core/test_early_stopping.py tests/core/test_noticed.py",
    "training/optimizers.py": "tests/core/test_noticed.py tests/core/test_families.py",
    "evaluation/judge_guards.py": "tests/core/test_noticed.py tests/core/test_guards.py",
    "evaluation/image_guards.py": "tests/core/test_guards.py",
    "evaluation/verdicts.py": "tests/core/test_page.py",
}
"""The tests of single files, which come before their room's; else those of the same name."""
ALL = "tests/core tests/stages --ignore tests/core/test_mutants.py"
"""Without the test that finds each line in its file."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Single wrong lines, and whether the tests notice."""

    only: str = ""
    """Only mutants whose name holds this text."""
    workers: int = 2
    """Copies of the tree that are tested at the same time."""
    answers: Path | None = None
    """What was noticed before, and where it is kept (JSON lines)."""
    quick: bool = False
    """Only the tests of each file's room: what they do not notice stays open."""
    output: Path | None = None
    """Where the table goes (Markdown); None prints it only."""


def main(args: Args) -> None:
    """Try all, then write the table."""
    chosen = [mutant for mutant in MUTANTS if args.only in mutant.name]
    if misplaced := [problem for mutant in chosen if (problem := mutant.problem())]:
        raise SystemExit("\n".join(misplaced))
    known = read_answers(args.answers)
    with tempfile.TemporaryDirectory() as place:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(args.workers):
            trees.put(copy_of_the_tree(Path(place) / str(number)))

        def attempt(mutant: Mutant) -> str:
            if mutant.digest() in known:
                return known[mutant.digest()]
            tree = trees.get()
            try:
                return notice(mutant, tree, args)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(args.workers) as pool:
            found = list(pool.map(attempt, chosen))
    text = table(chosen, found)
    print(text)
    if args.output and not args.quick:
        write_text(args.output, text)


def read_answers(path: Path | None) -> dict[str, str]:
    """By a mutant's digest: the test that noticed it."""
    if path is None or not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(json.loads(line) for line in lines)


def copy_of_the_tree(folder: Path) -> Path:
    """The tracked files as they are now."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def notice(mutant: Mutant, tree: Path, args: Args) -> str:
    """The first test that fails; empty if none does."""
    path = tree / "stages/core" / mutant.file
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace(mutant.right, mutant.wrong), encoding="utf-8")
    sets = [own_tests(mutant.file), FIRST[mutant.file.split("/")[0]]]
    if not args.quick and not mutant.equal_because:
        sets.append(ALL)
    try:
        failed = next(filter(None, (first_failure(tree, tests) for tests in sets if tests)), "")
    finally:
        path.write_text(right, encoding="utf-8")
    if failed and args.answers:
        with args.answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps([mutant.digest(), failed]) + "\n")
    print(f"{time.strftime('%H:%M:%S')} {mutant.name}: {failed or 'SURVIVED'}", flush=True)
    return failed


def own_tests(file: str) -> str:
    """The tests that know a file best; empty if there are none of its name."""
    same_name = f"tests/core/test_{Path(file).stem}.py"
    return OWN.get(file, same_name if (ROOT / same_name).is_file() else "")


def first_failure(tree: Path, tests: str) -> str:
    """Name of the first test that fails; empty if all pass. RuntimeError if pytest itself fails."""
    words = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not long and not gpu"]
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of libraries imported before
    output = tree / "pytest.txt"
    if run_pytest(tree, [*words, *tests.split()], output) == 0:
        return ""
    text = output.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not lines:
        raise RuntimeError(f"pytest did not say which test failed:\n{text[-2000:]}")
    return lines[0].split(" ")[1].split(" - ")[0]


def table(mutants: list[Mutant], found: list[str]) -> str:
    """Each mutant and what noticed it."""
    survived = [mutant for mutant, failed in zip(mutants, found, strict=True) if not failed]
    argued = [mutant for mutant in survived if mutant.equal_because]
    lines = [
        "# Single wrong lines, and the test that notices each\n",
        "    python -m tests.mutants --output tests/mutants/results.md\n",
        f"{len(mutants)} mutants: {len(mutants) - len(survived)} noticed, {len(argued)} that no test "
        f"can notice, {len(survived) - len(argued)} survived.\n",
        "| file | right | wrong | noticed by |",
        "|---|---|---|---|",
    ]
    for mutant, failed in zip(mutants, found, strict=True):
        by = f"`{failed.removeprefix('tests/')}`" if failed else "**survived**"
        if not failed and mutant.equal_because:
            by = f"nothing: {mutant.equal_because}"
        cells = (
            " ".join(text.split()).replace("|", "\\|") for text in (mutant.right, mutant.wrong)
        )
        right, wrong = (f"`{cell}`" if cell else "nothing" for cell in cells)
        lines.append(f"| {mutant.file} | {right} | {wrong} | {by.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
