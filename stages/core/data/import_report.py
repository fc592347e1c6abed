"""What an import tells of the pairs it has chosen, beside the counts: for import.json and the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.core.data.image_spool import ImageSpool
from stages.core.data.layouts.labels import Label
from stages.core.data.near_duplicates import MAX_DISTANCE, distance, has_near
from stages.core.errors import UserError

NUM_EXAMPLES = 10
NUM_RESOLUTIONS = 20


def describe_pairs(
    seed: Sequence[Label], holdout: Sequence[Label], spool: ImageSpool
) -> dict[str, Any]:
    """Repeated images, near-duplicates and resolutions of the chosen pairs, and what both sets share."""
    labels = [*seed, *holdout]
    digests = [tuple(map(spool.digest, places(label))) for label in labels]
    images = {digest for pair in digests for digest in pair}
    in_seed = {digest for pair in digests[: len(seed)] for digest in pair}
    in_holdout = {digest for pair in digests[len(seed) :] for digest in pair}
    return {
        "repeated_images": 2 * len(labels) - len(images),
        "images_in_both_sets": len(in_seed & in_holdout),
        **_near_duplicates(seed, holdout, spool),
        "resolutions": _resolutions(labels, spool),
    }


def describe_captions(prompts: Sequence[str], tokenizer: Path | None) -> dict[str, Any] | None:
    """How many captions the text encoder cuts; None without a tokenizer's folder at hand."""
    if tokenizer is None:
        return None
    from transformers import AutoTokenizer

    try:
        encoder = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{tokenizer} holds no readable tokenizer: {error}") from error
    limit = int(encoder.model_max_length)
    different = sorted(set(prompts))
    lengths = [len(ids) for ids in encoder(different)["input_ids"]] if different else []
    long = [prompt for prompt, length in zip(different, lengths, strict=True) if length > limit]
    return {"tokens_read": limit, "captions_cut": len(long), "examples": long[:NUM_EXAMPLES]}


def places(label: Label) -> tuple[Any, Any]:
    """Where the winner and the loser of a label stand."""
    return (label.file, label.winner), (label.loser_file or label.file, label.loser)


def _near_duplicates(
    seed: Sequence[Label], holdout: Sequence[Label], spool: ImageSpool
) -> dict[str, Any]:
    labels = [*seed, *holdout]
    looks = np.array(
        [[spool.stored(place).look for place in places(label)] for label in labels], np.uint64
    ).reshape(-1, 2)
    pairs = distance(looks[:, 0], looks[:, 1]) <= MAX_DISTANCE
    in_holdout = np.repeat(np.arange(len(labels)) >= len(seed), 2)
    across = has_near(looks.ravel(), in_holdout.astype(np.int64))
    different = {
        spool.digest(place): spool.stored(place).look for label in labels for place in places(label)
    }
    alone = np.fromiter(different.values(), np.uint64, len(different))
    return {
        "near_duplicate_pairs": int(pairs.sum()),
        "near_duplicate_pairs_examples": [
            f"{labels[row].file}, row {labels[row].row}"
            for row in np.flatnonzero(pairs)[:NUM_EXAMPLES]
        ],
        "near_duplicate_images": int(has_near(alone, np.arange(len(alone))).sum()),
        "held_out_images_like_a_seed_image": int((across & in_holdout).sum()),
    }


def _resolutions(labels: Sequence[Label], spool: ImageSpool) -> dict[str, int]:
    sizes = [spool.stored(place) for label in labels for place in places(label)]
    counts = Counter(f"{size.width}x{size.height}" for size in sizes)
    common = dict(counts.most_common(NUM_RESOLUTIONS))
    rest = len(sizes) - sum(common.values())
    return common | ({"other": rest} if rest else {})
