"""How many tokens a text encoder reads of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def num_truncated(tokenizer: Any, prompts: Sequence[str]) -> int:
    """How many prompts are longer than the tokenizer's text encoder reads."""
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False).input_ids]
    return sum(length > tokenizer.model_max_length for length in lengths)
