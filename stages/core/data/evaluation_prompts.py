"""Evaluation prompts by their place in the file: with category, challenge, and a key of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from stages.core.data.prompts import normalise, prompt_id, read_hpsv2, read_prompts
from stages.core.data.text_files import PROBLEM, Record, column_names, not_utf8, read_records
from stages.core.errors import UserError

PARTIPROMPTS = ("Prompt", "Category", "Challenge")
"""The official file's columns that are read."""

PromptLayout = Literal["plain", "partiprompts", "hpsv2"]


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


def read_evaluation_prompts(paths: Sequence[Path], layout: PromptLayout) -> list[EvaluationPrompt]:
    """The prompts of some files in one of the layouts, in their order.

    'plain' keeps different prompts and knows no category; 'partiprompts' is the official .tsv,
    'hpsv2' the benchmark's 4 x 800 prompts, repeats included: one file in the styles' order, or the
    four published ones. UserError names what is wrong.
    """
    if layout == "plain":
        rows = [EvaluationPrompt(prompt=prompt) for prompt in read_prompts(*paths)]
    elif layout == "partiprompts":
        rows = [row for path in paths for row in _read_partiprompts(path)]
    else:
        items = read_hpsv2(paths[0] if len(paths) == 1 else paths[0].parent)
        rows = [EvaluationPrompt(prompt=i.prompt, category=i.style, item=i.index) for i in items]
    return list({row.prompt_id: row for row in rows}.values())


def shared_prompts(evaluation: Iterable[str], training: Iterable[str]) -> list[str]:
    """The evaluation prompts that a training sees too, by normalised text, each once."""
    seen = {prompt_id(prompt) for prompt in training}
    shared = {prompt_id(p): p for p in evaluation if prompt_id(p) in seen}
    return list(shared.values())


def _read_partiprompts(path: Path) -> list[EvaluationPrompt]:
    """Rows of the official file. Quotes are part of a prompt (`"G I G G L E" ...`), never syntax."""
    names = column_names(path)
    for name in PARTIPROMPTS:
        if name not in names:
            raise UserError(
                f"{path} has no column {name!r} (found: {', '.join(names) or 'nothing'}); layout "
                "'partiprompts' is the tab-separated PartiPrompts.tsv of google-research/parti"
            )
    rows = []
    for number, record in enumerate(read_records(path, has_literal_quotes=True)):
        if problem := record.get(PROBLEM) or _problem(record):
            raise UserError(f"{path}, row {number}: {problem}")
        prompt, category, challenge = (record[name] for name in PARTIPROMPTS)
        rows.append(EvaluationPrompt(prompt=prompt.strip(), category=category, challenge=challenge))
    return rows


def _problem(record: Record) -> str | None:
    """What is wrong with a row of PartiPrompts; None if nothing is."""
    texts = [record.get(name) for name in PARTIPROMPTS]
    if not all(isinstance(text, str) for text in texts):
        return f"expected texts in {', '.join(PARTIPROMPTS)}, found {texts}"
    if not normalise(record["Prompt"]):
        return "the prompt is empty"
    return next(filter(None, (not_utf8(record[name]) for name in PARTIPROMPTS)), None)
