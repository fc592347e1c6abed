"""Guards of what is drawn: whether the images of a prompt still differ, whether some are blank."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stages.core.artifacts.schemas import column
from stages.core.evaluation.guard import Guard, Limit, Line, Measured
from stages.core.evaluation.guard_tables import Evidence, floats
from stages.core.evaluation.wording import percent


def mean_over_prompts(evidence: Evidence, column: str) -> float:
    """Mean of a diversity over the prompts that have one; nan if none has."""
    known = [row[column] for row in evidence.diversity if row[column] is not None]
    return float(np.mean(known)) if known else float("nan")


GENTLER = "Use the policy before, or train more gently (update_policy.learning_rate, passes)."


def diversity_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    """Set when diversity has fallen below the limit's share of iteration 0's."""
    if not row["diversity"] < limit * seed["diversity"]:
        return None
    return (
        f"{row['policy']} has lost diversity: its images of one prompt differ "
        f"{percent(row['diversity'] / seed['diversity'])} as much as those of {seed['policy']} "
        f"(limit {percent(limit)})."
    )


MIN_DIVERSITY_SHARE = Limit(
    key="min_diversity_share",
    default=0.6,
    meaning="Diversity, of pixels or of features, falls below this share of iteration 0's.",
)

DIVERSITY = Guard(
    columns=(
        column("diversity", pa.float64(), "mean distance of images of one prompt, in [0, 1]"),
    ),
    title="Diversity",
    meaning="How much the images of one prompt differ from each other. A steep fall means "
    "that the model draws the same picture again and again.",
    measure=lambda evidence: {"diversity": mean_over_prompts(evidence, "pixel_distance")},
    limit=MIN_DIVERSITY_SHARE,
    sentence=diversity_sentence,
    advice=GENTLER,
    limit_line=lambda limit, seed: Line(limit * seed["diversity"]),
)


def feature_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    """Set when the features' diversity has fallen below the limit's share of iteration 0's."""
    if not row["feature_diversity"] < limit * seed["feature_diversity"]:
        return None
    return (
        f"{row['policy']} draws the same picture again and again: by features ({row['features']}) its "
        f"images of one prompt differ {percent(row['feature_diversity'] / seed['feature_diversity'])} "
        f"as much as those of {seed['policy']} (limit {percent(limit)})."
    )


FEATURE_DIVERSITY = Guard(
    columns=(
        column(
            "feature_diversity",
            pa.float64(),
            "mean distance of images of one prompt in the features named beside it",
        ),
        column(
            "features",
            pa.string(),
            "'perceptual' for colour differences, or the metric whose CLIP gives cosines",
        ),
    ),
    title="Diversity of features",
    meaning="The same as a viewer would see it: by the cosine of a CLIP's features, or by colour "
    "from some steps away. Noise and grain do not count.",
    measure=lambda evidence: {
        "feature_diversity": mean_over_prompts(evidence, "feature_distance"),
        "features": evidence.diversity[0]["features"],
    },
    limit=MIN_DIVERSITY_SHARE,
    sentence=feature_sentence,
    advice=GENTLER,
    limit_line=lambda limit, seed: Line(limit * seed["feature_diversity"]),
    note=lambda row: str(row["features"]),
)


def measure_moved(evidence: Evidence) -> Measured:
    """How far images lie from the base's of the same noise, and how far held-out logits from 0."""
    found = {
        f"moved_{kind}": [row[f"moved_{kind}"] for row in evidence.diversity]
        for kind in ("pixels", "features")
    }
    if None in found["moved_pixels"]:
        return {}
    judged = np.clip(floats(evidence.held_out, "probability"), 1e-9, 1 - 1e-9)
    logits = np.log(judged) - np.log1p(-judged)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    return {**means, "held_out_logit": float(np.abs(logits).mean())}


def moved_share(row: Measured, seed: Measured) -> float | None:
    """The larger of what pixels and features moved, of what two images of one prompt differ."""
    if row["moved_pixels"] is None:
        return None
    shares = [
        row[f"moved_{kind}"] / seed[of]
        for kind, of in (("pixels", "diversity"), ("features", "feature_diversity"))
        if seed[of] > 0
    ]
    return max(shares, default=None)


def moved_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    """Set when the images are nearly the base's own."""
    share = moved_share(row, seed)
    if share is None or not share < limit:
        return None
    return (
        f"{row['policy']} hardly moved: its images differ from the base's of the same noise by "
        f"{255 * row['moved_pixels']:.2g} of 255 grey levels, {share:.1%} of what two images of one "
        f"prompt differ (limit {limit:.0%}), and its mean held-out logit is "
        f"{row['held_out_logit']:.2g}. It learnt next to nothing."
    )


def moved_note(row: Measured) -> str:
    """In grey levels."""
    if row["moved_pixels"] is None:
        return ""
    return f"{255 * row['moved_pixels']:.2g} of 255 grey levels"


MOVED = Guard(
    columns=(
        column(
            "moved_pixels",
            pa.float64(),
            "root mean squared difference of images from the base's of the same noise, in [0, 1]",
            nullable=True,
        ),
        column(
            "moved_features",
            pa.float64(),
            "the same in the features of feature_diversity",
            nullable=True,
        ),
        column(
            "held_out_logit",
            pa.float64(),
            "mean size of log p / (1 - p) over the held-out pairs",
            nullable=True,
        ),
    ),
    title="Moved from base",
    meaning="How far its images lie from those that the base draws from the same noise. Near 0 it "
    "learnt nothing, whatever a win rate says.",
    measure=measure_moved,
    limit=Limit(
        key="min_moved_share",
        default=0.02,
        meaning="Images differ from the base's by less than this share of what two of a prompt do.",
    ),
    sentence=moved_sentence,
    advice="Raise the learning rate or the passes; a LoRA wants a much larger rate than a full fine-tune "
    "(docs/howto.md, 'A policy that hardly moved').",
    limit_line=lambda limit, seed: Line(limit * seed["diversity"]),
    note=moved_note,
    tells_of_collapse=False,
)


def measure_blanks(evidence: Evidence) -> Measured:
    """How many images are blank."""
    rows = evidence.diversity
    num_images = sum(row["num_images"] for row in rows)
    return {"blank_share": sum(row["num_blank"] for row in rows) / num_images}


def blank_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    """Set when more images than the limit's share are of nearly one colour."""
    if not row["blank_share"] > limit:
        return None
    return (
        f"{row['blank_share']:.1%} of the images of {row['policy']} are black or of nearly one "
        f"colour (limit {limit:.1%}): look at them, and at whether a safety checker is on."
    )


BLANK_SHARE = Guard(
    columns=(column("blank_share", pa.float64(), "share of images that are of nearly one colour"),),
    title="Blank images",
    meaning="How many images are black or of nearly one colour, as a safety checker leaves "
    "them or a broken model draws them. Their scores mean nothing.",
    measure=measure_blanks,
    limit=Limit(
        key="max_blank_share",
        default=0.01,
        meaning="More than this share of images is of nearly one colour.",
    ),
    sentence=blank_sentence,
    is_share=True,
)


def truncated_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    """Set when a text encoder cuts more than the limit's share of the evaluation prompts."""
    if not row["truncated_share"] > limit:
        return None
    return (
        f"{row['truncated_share']:.1%} of the evaluation prompts are longer than the text encoder "
        f"reads (limit {limit:.1%}): metrics see words that the model does not."
    )


TRUNCATED_SHARE = Guard(
    columns=(
        column("truncated_share", pa.float64(), "share of evaluation prompts cut by an encoder"),
    ),
    title="Truncated prompts",
    meaning="How many evaluation prompts are longer than the text encoder reads, so that "
    "their end has no influence. The same for every policy.",
    measure=lambda evidence: {"truncated_share": evidence.tables.truncated_share},
    limit=Limit(
        key="max_truncated_share",
        default=0.05,
        meaning="A text encoder cuts more than this share of the evaluation prompts.",
    ),
    sentence=truncated_sentence,
    advice="Shorten them, or give less weight to metrics of the prompt.",
    is_share=True,
    tells_of_collapse=False,
)
