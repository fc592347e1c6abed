"""How many prompts a pool has for the iterations, counted before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from stages.core.data.evaluation_prompts import EvaluationPrompt, read_evaluation_prompts
from stages.core.data.prompts import prompt_id, read_pool
from stages.core.errors import UserError
from stages.core.plan.run import Problem, RunPlan, files_of

MAX_BYTES = 8_000_000
"""Of a pool that is counted whenever Snakemake starts, which takes less than a second."""


def count_free(pool: Iterable[str], evaluation: Iterable[str]) -> int:
    """Different prompts of a pool that no evaluation set holds.

    An upper bound: the prompts of the seed pairs, which are not drawn yet, are left out later.
    """
    return len({prompt_id(text) for text in pool} - {prompt_id(text) for text in evaluation})


def small_pool_problems(plan: RunPlan) -> Iterator[Problem]:
    """What is wrong with a pool of a few megabytes; nothing is said of a larger one.

    Reads its files, and those of the evaluation sets that are kept out of it.
    """
    files = [Path(name) for name in files_of(plan.pool)]
    if not (plan.iterations or plan.is_online) or not is_small(files):
        return
    try:
        pool = read_pool(*files)
    except UserError as error:
        yield Problem(key="prompts.pool", text=str(error))
        return
    evaluation: list[EvaluationPrompt] = []
    for name in plan.excluded_sets:
        try:
            evaluation += read_set(plan, name)
        except UserError as error:
            yield Problem(key=f"evaluation.prompt_sets.{name}", text=str(error))
    yield from plan.pool_problems(count_free(pool.prompts, (row.prompt for row in evaluation)))


def read_set(plan: RunPlan, name: str) -> list[EvaluationPrompt]:
    """The prompts of an evaluation set. UserError says what is wrong with its files."""
    evaluation = plan.config["evaluation"]
    files = [Path(file) for file in files_of([evaluation["prompt_sets"][name]])]
    return read_evaluation_prompts(files, evaluation["prompt_layouts"].get(name, "plain"))


def is_small(files: list[Path]) -> bool:
    """Whether these are plain files of no more than `MAX_BYTES` together; false for none."""
    are_plain = all(file.is_file() for file in files)
    return bool(files) and are_plain and sum(file.stat().st_size for file in files) <= MAX_BYTES
