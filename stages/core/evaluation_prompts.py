"""Evaluation prompts where they stand in their file: with category, challenge, and a key of their own."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from stages.core.errors import UserError
from stages.core.prompts import normalise, prompt_id, read_prompts

Layout = Literal["plain", "partiprompts", "hpsv2"]

HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
HPSV2_PER_STYLE = 800


@dataclass(frozen=True, kw_only=True)
class EvaluationPrompt:
    """One row of an evaluation set."""

    prompt: str
    category: str | None = None
    """PartiPrompts' category, HPSv2's style."""
    challenge: str | None = None
    """PartiPrompts' challenge."""
    item: int | None = None
    """Keyed sets: its position within the category; equal prompts stay apart."""

    @property
    def prompt_id(self) -> str:
        """A digest of the normalised prompt; of category, item and prompt in a keyed set."""
        if self.item is None:
            return prompt_id(self.prompt)
        key = f"{self.category}\n{self.item}\n{normalise(self.prompt)}"
        return blake2b(key.encode(), digest_size=8).hexdigest()


def read_evaluation_prompts(path: Path, layout: Layout) -> list[EvaluationPrompt]:
    """The prompts of a file in one of the layouts, in its order.

    'plain' keeps different prompts and knows no category; 'partiprompts' is the official .tsv,
    'hpsv2' the benchmark's 4 x 800 prompts, repeats included. UserError names what is wrong.
    """
    if layout == "partiprompts":
        rows = _read_partiprompts(path)
    elif layout == "hpsv2":
        rows = _read_hpsv2(path)
    else:
        rows = [EvaluationPrompt(prompt=prompt) for prompt in read_prompts(path)]
    for number, row in enumerate(rows):
        if not normalise(row.prompt):
            raise UserError(f"{path}: the prompt in row {number} is empty")
    return list({row.prompt_id: row for row in rows}.values())


def shared_prompts(evaluation: Iterable[str], training: Iterable[str]) -> list[str]:
    """The evaluation prompts that a training sees too, by normalised text, each once."""
    seen = {prompt_id(prompt) for prompt in training}
    shared = {prompt_id(p): p for p in evaluation if prompt_id(p) in seen}
    return list(shared.values())


def _read_partiprompts(path: Path) -> list[EvaluationPrompt]:
    """Rows of the official file. Quotes are part of a prompt (`"G I G G L E" ...`), never syntax."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable PartiPrompts file: {error}") from error
    names = list(rows[0]) if rows else []
    for name in ("Prompt", "Category", "Challenge"):
        if name not in names:
            raise UserError(
                f"{path} has no column {name!r} (found: {', '.join(names) or 'nothing'}); layout "
                "'partiprompts' is the tab-separated PartiPrompts.tsv of google-research/parti"
            )
    return [
        EvaluationPrompt(prompt=row["Prompt"], category=row["Category"], challenge=row["Challenge"])
        for row in rows
    ]


def _read_hpsv2(path: Path) -> list[EvaluationPrompt]:
    """From the folder of the four published lists, or one list of all 3,200 in the styles' order."""
    if path.is_dir():
        parts = [_read_texts(path / f"{style}.json") for style in HPSV2_STYLES]
    else:
        texts = _read_texts(path)
        starts = range(0, max(len(texts), 1), HPSV2_PER_STYLE)
        parts = [texts[start : start + HPSV2_PER_STYLE] for start in starts]
    if [len(part) for part in parts] != [HPSV2_PER_STYLE] * len(HPSV2_STYLES):
        raise UserError(
            f"{path} holds {sum(map(len, parts))} prompts; layout 'hpsv2' needs "
            f"{HPSV2_PER_STYLE} of each style, in the order {', '.join(HPSV2_STYLES)}"
        )
    return [
        EvaluationPrompt(prompt=text, category=style, item=item)
        for style, part in zip(HPSV2_STYLES, parts, strict=True)
        for item, text in enumerate(part)
    ]


def _read_texts(path: Path) -> list[str]:
    """A JSON list of texts, or of objects with a text 'prompt'."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no readable JSON file: {error}") from error
    if not isinstance(values, list):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a list of prompts")
    texts = [value.get("prompt") if isinstance(value, dict) else value for value in values]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        number = next(i for i, text in enumerate(texts) if not isinstance(text, str))
        raise UserError(f"{path}: entry {number} is no text and has no text 'prompt'")
    return found
