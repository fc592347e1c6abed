"""What a text encoder reads of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from stages.core.models.loading import ModelError

if TYPE_CHECKING:
    from torch import Tensor

OTHER_PRECISION = "Set model.dtype to bfloat16 or float32, or look whether the file is damaged."


def num_truncated(tokenizer: Any, prompts: Sequence[str]) -> int:
    """How many prompts are longer than the tokenizer's text encoder reads."""
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False).input_ids]
    return sum(length > tokenizer.model_max_length for length in lengths)


def clip_tokens(base: str, tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids, cut to a CLIP's length. ModelError for a tokenizer of another model."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    config = encoder.config
    if len(tokenizer) > config.vocab_size or (
        tokenizer.model_max_length > config.max_position_embeddings
    ):
        raise ModelError(
            f"{base}: the tokenizer has {len(tokenizer)} words and reads "
            f"{tokenizer.model_max_length} tokens, the text encoder knows {config.vocab_size} "
            f"and {config.max_position_embeddings}; they belong to different models"
        )
    return cast("Tensor", tokens)
