"""Everything that keeps a run from beginning, in one list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from stages.core.plan.run import Problem, RunPlan


def problems_of(
    plan: RunPlan,
    known: Sequence[str],
    networks: Iterable[str],
    features: str,
    *,
    world_pool: Callable[[int], int],
) -> list[Problem]:
    """What is wrong with a run and can be known before its first job; empty where nothing is.

    The metrics are told as `RunPlan.metric_problems` takes them. `world_pool` says how many prompts the
    embedded world has left beside so many captions of the seed. Prompts are counted only where all else
    is right.
    """
    found = [
        *plan.file_problems(),
        *plan.family_problems(),
        *plan.metric_problems(known, networks, features),
    ]
    if found:
        return found
    if plan.is_world:
        num_seed_captions: int = plan.config["shapes"]["num_seed_captions"]
        return list(plan.pool_problems(world_pool(num_seed_captions)))
    # Only here, for it imports pyarrow, which the jobs of a world need not wait for.
    from stages.core.plan.pool import small_pool_problems

    return list(small_pool_problems(plan))
