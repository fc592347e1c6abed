"""Rows of a table of generated pairs: their images, latents, seeds, and where they came from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.artifacts.images import image_size
from stages.core.artifacts.joins import joined_batches
from stages.core.artifacts.schemas import CANDIDATES, PREFERENCES
from stages.core.artifacts.spools import RowSpool
from stages.core.artifacts.tables import read_batches, read_table
from stages.core.errors import UserError

Row = dict[str, Any]
IMAGES_AT_ONCE = 16
JUDGEMENT = ("winner_score", "loser_score", "margin", "margin_standard_error", "probability")


def spool_candidates(
    spool: RowSpool,
    wanted: set[tuple[str, int]],
    files: Iterable[Path],
    iteration: int,
) -> dict[tuple[str, int], int]:
    """Keep the images of some candidates, shard after shard; where each (prompt_id, candidate) is.

    UserError unless every one is there, once.
    """
    columns = ["prompt_id", "prompt", "candidate", "seed", "image", "latents"]
    found: dict[tuple[str, int], int] = {}
    for path in files:
        keys = read_table(path, CANDIDATES, ["prompt_id", "candidate"]).to_pylist()
        names = [(key["prompt_id"], key["candidate"]) for key in keys]
        rows = [row for row, name in enumerate(names) if name in wanted]
        numbers = [
            number
            for batch in read_batches(path, CANDIDATES, columns, size=IMAGES_AT_ONCE, rows=rows)
            for number in spool.add(batch)
        ]
        for row, number in zip(rows, numbers, strict=True):
            if names[row] in found:
                raise UserError(
                    f"{path}, row {row}: candidate {names[row][1]} of prompt {names[row][0]} is there "
                    f"twice. Run sample_candidates again for iteration {iteration}."
                )
            found[names[row]] = number
    missing = sorted({name for name, _ in wanted - found.keys()})
    if missing:
        prompts = {name for name, _ in wanted}
        raise UserError(
            f"the candidates hold {len(prompts) - len(missing)} of the {len(prompts)} prompts that the "
            f"rewards have; {missing[0]} is missing. Run sample_candidates and score_candidates "
            f"again for iteration {iteration}."
        )
    return found


def spool_human(
    spool: RowSpool,
    prompts: Sequence[str],
    preferences: Path,
    latents: Path,
    choose: Callable[[str, Sequence[int]], int],
) -> dict[str, int]:
    """Keep a human pair of each prompt, by `choose` where there are several; where it is.

    UserError where no person has judged a prompt.
    """
    names = read_table(preferences, PREFERENCES, ["prompt_id"]).column("prompt_id").to_pylist()
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(names):
        rows_of[name].append(row)
    for name in prompts:
        if name not in rows_of:
            raise UserError(
                f"{preferences} has no pair of the prompt {name}, of which candidates were sampled. With "
                "select_pairs.strategy spin the prompts are captions of human pairs: run select_prompts again"
            )
    chosen = {choose(name, rows_of[name]): name for name in prompts}
    rows = sorted(chosen)
    numbers = [
        number
        for batch in joined_batches(preferences, latents, rows, size=IMAGES_AT_ONCE)
        for number in spool.add(batch)
    ]
    return {chosen[row]: number for row, number in zip(rows, numbers, strict=True)}


def pair_row(
    name: str, winner: Row, loser: Row, judgement: Mapping[str, Any], *, iteration: int, policy: str
) -> Row:
    """A row of the pairs table; `winner` is a candidate, or a human pair whose winner it is."""
    return {
        "pair_id": name,
        "prompt_id": loser["prompt_id"],
        "prompt": loser["prompt"],
        "source": "generated",
        "iteration": iteration,
        "policy_digest": policy,
        **(_side("winner", winner) if "candidate" in winner else _winner_of(winner)),
        **_side("loser", loser),
        **{key: judgement[key] for key in JUDGEMENT},
    }


def _side(side: str, candidate: Row) -> Row:
    """One side of a pair that the policy drew."""
    return {
        side: candidate["image"],
        f"{side}_candidate": candidate["candidate"],
        f"{side}_seed": candidate["seed"],
        f"{side}_latents": candidate["latents"],
        f"{side}_geometry": native_geometry(candidate["image"]["bytes"]),
    }


def _winner_of(pair: Row) -> Row:
    """The winner of a human pair as that of a new one."""
    names = ("winner", "winner_latents", "winner_geometry", "source_file", "source_row")
    return {name: pair[name] for name in names}


def native_geometry(data: bytes) -> list[int]:
    """The geometry of an image that a model made: its own size, nothing cropped."""
    width, height = image_size(data)
    return [height, width, 0, 0, height, width]
