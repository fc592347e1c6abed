"""What an import tells of the labels it has chosen, beside the counts: for import.json and the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from stages.core.data.image_spool import ImageSpool
from stages.core.data.layouts.labels import Place
from stages.core.data.near_duplicates import MAX_DISTANCE, distance, has_near
from stages.core.errors import UserError

NUM_EXAMPLES = 10
NUM_RESOLUTIONS = 20


@runtime_checkable
class Chosen(Protocol):
    """A label that was chosen: of a pair, or of one image."""

    @property
    def file(self) -> Path:
        """The file that it stands in."""

    @property
    def row(self) -> int:
        """Its row there."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Where its images stand."""


def describe_labels(
    seed: Sequence[Chosen], holdout: Sequence[Chosen], spool: ImageSpool
) -> dict[str, Any]:
    """Repeated images, near-duplicates and resolutions of the chosen labels, and what both sets share."""
    labels = [*seed, *holdout]
    digests = [tuple(map(spool.digest, label.places)) for label in labels]
    images = {digest for several in digests for digest in several}
    in_seed = {digest for several in digests[: len(seed)] for digest in several}
    in_holdout = {digest for several in digests[len(seed) :] for digest in several}
    return {
        "repeated_images": sum(map(len, digests)) - len(images),
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


def _near_duplicates(
    seed: Sequence[Chosen], holdout: Sequence[Chosen], spool: ImageSpool
) -> dict[str, Any]:
    labels = [*seed, *holdout]
    several = [[spool.stored(place).look for place in label.places] for label in labels]
    pairs = [row for row, looks in enumerate(several) if len(looks) == 2]
    both = np.array([several[row] for row in pairs], np.uint64).reshape(-1, 2)
    near = np.array(pairs, np.int64)[distance(both[:, 0], both[:, 1]) <= MAX_DISTANCE]
    looks = np.array([look for own in several for look in own], np.uint64)
    in_holdout = np.repeat(np.arange(len(labels)) >= len(seed), list(map(len, several)))
    across = has_near(looks, in_holdout.astype(np.int64))
    different = {
        spool.digest(place): spool.stored(place).look for label in labels for place in label.places
    }
    alone = np.fromiter(different.values(), np.uint64, len(different))
    return {
        "near_duplicate_pairs": len(near),
        "near_duplicate_pairs_examples": [
            f"{labels[row].file}, row {labels[row].row}" for row in near[:NUM_EXAMPLES]
        ],
        "near_duplicate_images": int(has_near(alone, np.arange(len(alone))).sum()),
        "held_out_images_like_a_seed_image": int((across & in_holdout).sum()),
    }


def _resolutions(labels: Sequence[Chosen], spool: ImageSpool) -> dict[str, int]:
    sizes = [spool.stored(place) for label in labels for place in label.places]
    counts = Counter(f"{size.width}x{size.height}" for size in sizes)
    common = dict(counts.most_common(NUM_RESOLUTIONS))
    rest = len(sizes) - sum(common.values())
    return common | ({"other": rest} if rest else {})
