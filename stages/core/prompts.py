"""Prompts: reading them, naming them, and keeping sets of them apart."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np

from stages.core.artifacts import read_table
from stages.core.errors import UserError
from stages.core.schemas import PROMPTS


def normalise(prompt: str) -> str:
    """The prompt as it counts when sets are compared: Unicode form, case and spacing set aside."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def prompt_id(prompt: str) -> str:
    """A digest of the normalised prompt, 16 hex digits."""
    return blake2b(normalise(prompt).encode(), digest_size=8).hexdigest()


def read_prompts(path: Path) -> list[str]:
    """The different prompts of a .txt file (one a line) or a prompts table, in their order.

    UserError names the file and line of an empty prompt, or says that there is none at all.
    """
    if path.suffix == ".parquet":
        prompts = read_table(path, PROMPTS, ["prompt"]).column("prompt").to_pylist()
    elif path.suffix == ".txt":
        prompts = _read_lines(path)
    else:
        raise UserError(f"{path}: prompts are read from .txt or .parquet, found {path.suffix!r}")
    for row, prompt in enumerate(prompts):
        if not normalise(prompt):
            raise UserError(f"{path}: the prompt in row {row} is empty")
    if not prompts:
        raise UserError(f"{path} holds no prompts; expected one a line")
    different: dict[str, str] = {}
    for prompt in prompts:
        different.setdefault(prompt_id(prompt), prompt)
    return list(different.values())


def select_prompts(
    pool: Iterable[str], *, excluded: set[str], shuffle_seed: int | None, skip: int, take: int
) -> list[str]:
    """`take` prompts of the pool after the first `skip`, none of them with an excluded id.

    With a shuffle seed the pool's order is drawn first; blocks of one seed never overlap.
    UserError if too few prompts are left.
    """
    free = [prompt for prompt in pool if prompt_id(prompt) not in excluded]
    if shuffle_seed is not None:
        free.sort(key=prompt_id)
        order = np.random.default_rng(shuffle_seed).permutation(len(free))
        free = [free[index] for index in order]
    chosen = free[skip : skip + take]
    if take < 1 or len(chosen) < take:
        raise UserError(
            f"{take} prompts were asked for after the first {skip}, but the pool has only "
            f"{len(free)} that no other set uses. Ask for fewer or give more prompts."
        )
    return chosen


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a text file with one prompt a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
