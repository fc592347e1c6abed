"""The schema of every table the stages exchange: each field with its meaning and unit."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pyarrow as pa

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An image as Hugging Face `datasets` stores it: the bytes of a PNG or JPEG file."""

LATENTS = pa.list_(pa.float32())
"""Scaled VAE latents of one image, flattened from (channel, height, width)."""

GEOMETRY = pa.list_(pa.int32())
"""Original height and width, top and left of the crop, target height and width, in pixels."""


@dataclass(frozen=True)
class Schema:
    """A named, versioned table layout."""

    name: str
    version: int
    arrow: pa.Schema

    def with_metadata(self, extra: dict[str, str]) -> pa.Schema:
        """The layout with its name, its version and what `datasets` needs to decode images."""
        metadata = {
            "sail_schema": f"{self.name}/{self.version}",
            "huggingface": json.dumps({"info": {"features": _features(self.arrow)}}),
            **extra,
        }
        # `datasets` decodes only columns that may be null; `artifacts` refuses nulls all the same.
        fields = [
            field.with_nullable(True) if field.type == IMAGE else field for field in self.arrow
        ]
        return pa.schema(fields, metadata=metadata)


def column(name: str, kind: pa.DataType, meaning: str, *, nullable: bool = False) -> pa.Field:
    """A column with its meaning, and its unit where it has one."""
    return pa.field(name, kind, nullable=nullable, metadata={"description": meaning})


def _features(schema: pa.Schema) -> dict[str, object]:
    """The `datasets` features of a schema."""

    def feature(kind: pa.DataType) -> object:
        if kind == IMAGE:
            return {"_type": "Image"}
        if pa.types.is_list(kind):
            return {"feature": feature(kind.value_type), "_type": "List"}
        name = {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
        return {"dtype": name, "_type": "Value"}

    return {field.name: feature(field.type) for field in schema}


_PROMPT = [
    column("prompt_id", pa.string(), "digest of the normalised prompt; the key of every table"),
    column("prompt", pa.string(), "text as it is given to the model"),
]

PROMPTS = Schema("prompts", 1, pa.schema(_PROMPT))

EVALUATION_PROMPTS = Schema(
    "evaluation_prompts",
    1,
    pa.schema(
        [
            column(
                "prompt_id", pa.string(), "digest of the prompt, of category and item too if keyed"
            ),
            *_PROMPT[1:],
            column("category", pa.string(), "its file's category or style", nullable=True),
            column("challenge", pa.string(), "PartiPrompts' challenge", nullable=True),
            column("item", pa.int32(), "keyed sets: position within the category", nullable=True),
        ]
    ),
)

PICKAPIC = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)
"""The 19 columns of Pick-a-Pic v2, as its card lists them; its trainers read jpg_*, label_0, caption."""

_PREFERENCE = [
    column("pair_id", pa.string(), "unique name of the pair"),
    *_PROMPT,
    column("winner", IMAGE, "the preferred image"),
    column("loser", IMAGE, "the other image"),
    column("source", pa.string(), "'human' or 'generated'"),
    column("iteration", pa.int32(), "iteration that made the pair; 0 for human pairs"),
    column("source_file", pa.string(), "human pairs: file it was read from", nullable=True),
    column("source_row", pa.int64(), "human pairs: row in that file, from 0", nullable=True),
    column("policy_digest", pa.string(), "generated pairs: policy that sampled", nullable=True),
    column("winner_candidate", pa.int32(), "generated pairs: candidate number", nullable=True),
    column("loser_candidate", pa.int32(), "generated pairs: candidate number", nullable=True),
    column("winner_seed", pa.int64(), "generated pairs: sampling seed", nullable=True),
    column("loser_seed", pa.int64(), "generated pairs: sampling seed", nullable=True),
    column("winner_score", pa.float32(), "generated pairs: what ranked it", nullable=True),
    column("loser_score", pa.float32(), "generated pairs: what ranked it", nullable=True),
    column("margin", pa.float32(), "implicit reward of winner minus loser", nullable=True),
    column("margin_standard_error", pa.float32(), "of the margin, over draws", nullable=True),
    column("probability", pa.float32(), "p(winner > loser), SAIL Eq. 9", nullable=True),
]

PREFERENCES = Schema("preferences", 1, pa.schema(_PREFERENCE))

LIKES = Schema(
    "likes",
    1,
    pa.schema(
        [
            column("image_id", pa.string(), "unique name of the image and its label"),
            *_PROMPT,
            column("image", IMAGE, "the image that was liked or disliked"),
            column("is_liked", pa.bool_(), "what the person said of it"),
            column("source", pa.string(), "'human'"),
            column("source_file", pa.string(), "file it was read from"),
            column("source_row", pa.int64(), "row in that file, from 0"),
        ]
    ),
)

LIKED_PAIRS = Schema(
    "liked_pairs",
    1,
    pa.schema(
        [
            *_PREFERENCE,
            column("loser_prompt", pa.string(), "the disliked image's prompt, often another one"),
            column("loser_source_file", pa.string(), "file the disliked image was read from"),
            column("loser_source_row", pa.int64(), "row in that file, from 0"),
        ]
    ),
)
"""Held-out likes: a liked image (winner) beside a disliked one (loser), which nobody has compared. Whatever reads
preferences reads them too."""

HUMAN_LABELS = Schema(
    "human_labels",
    2,
    pa.schema(
        [
            *_PROMPT,
            column("image_a", IMAGE, "the image that stood on the left"),
            column("image_b", IMAGE, "the image that stood on the right"),
            column("winner", pa.string(), "'image_a', 'image_b' or 'tie'"),
            column("labeller", pa.string(), "who said so, by the name they gave"),
            column("labelled_at", pa.string(), "when, ISO 8601 in UTC"),
            column("is_common", pa.bool_(), "whether every labeller was asked about the pair"),
            column("image_a_name", pa.string(), "file or row that the left image was read from"),
            column("image_b_name", pa.string(), "file or row that the right image was read from"),
            column(
                "may_be_held_out", pa.bool_(), "whether chance alone chose to ask about the prompt"
            ),
        ]
    ),
)

HUMAN_RANKINGS = Schema(
    "human_rankings",
    1,
    pa.schema(
        [
            *_PROMPT,
            column("images", pa.list_(IMAGE), "the images as they stood, from left to right"),
            column("ranks", pa.list_(pa.int32()), "rank of each image: 1 is best, equal ones tie"),
            column("labeller", pa.string(), "who said so, by the name they gave"),
            column("labelled_at", pa.string(), "when, ISO 8601 in UTC"),
            column("is_common", pa.bool_(), "whether every labeller was asked about the set"),
            column("image_names", pa.list_(pa.string()), "file or row that each was read from"),
            column(
                "may_be_held_out", pa.bool_(), "whether chance alone chose to ask about the prompt"
            ),
        ]
    ),
)

JUDGED_IMAGES = Schema(
    "judged_images",
    1,
    pa.schema(
        [
            *_PROMPT,
            column("image_name", pa.string(), "file or row that the image was read from"),
            column("image_digest", pa.string(), "names the bytes of its file"),
            column("reward", pa.float64(), "implicit reward of the policy that judges"),
            column("standard_error", pa.float64(), "of the reward, over draws", nullable=True),
            column("view", pa.list_(pa.float32()), "its cells from far away: (row, column, L a b)"),
        ]
    ),
)

PAIR_LATENTS = Schema(
    "pair_latents",
    2,
    pa.schema(
        [
            column("pair_id", pa.string(), "the pair"),
            column("winner_latents", LATENTS, "latents of the winner"),
            column("loser_latents", LATENTS, "latents of the loser"),
            column("winner_geometry", GEOMETRY, "sizes and crop of the winner, as SDXL is told"),
            column("loser_geometry", GEOMETRY, "sizes and crop of the loser, as SDXL is told"),
        ]
    ),
)

LIKE_LATENTS = Schema(
    "like_latents",
    1,
    pa.schema(
        [
            column("image_id", pa.string(), "the image"),
            column("latents", LATENTS, "its latents"),
            column("geometry", GEOMETRY, "its sizes and crop, as SDXL is told"),
        ]
    ),
)

TRAINING_PAIRS = Schema(
    "training_pairs",
    2,
    pa.schema([*_PREFERENCE, *list(PAIR_LATENTS.arrow)[1:]]),
)

IMAGES = Schema(
    "images",
    1,
    pa.schema(
        [
            *_PROMPT,
            column("candidate", pa.int32(), "number of the image among its prompt's, from 0"),
            column("seed", pa.int64(), "torch.Generator('cpu') seed of the image's noise"),
            column("image", IMAGE, "the decoded image"),
        ]
    ),
)

CANDIDATES = Schema(
    "candidates",
    1,
    pa.schema([*IMAGES.arrow, column("latents", LATENTS, "the sampler's own latents")]),
)

REWARDS = Schema(
    "rewards",
    1,
    pa.schema(
        [
            *_PROMPT[:1],
            column("candidate", pa.int32(), "the image"),
            column("reward", pa.float32(), "implicit reward in mean squared noise, SAIL Eq. 8"),
            column("standard_error", pa.float32(), "of the reward, over draws", nullable=True),
            column("policy_errors", pa.list_(pa.float32()), "denoising error of each draw"),
            column("reference_errors", pa.list_(pa.float32()), "denoising error of each draw"),
            column("timesteps", pa.list_(pa.int32()), "timestep of each draw"),
            column("draw_seed", pa.int64(), "seed of the prompt's draws"),
        ]
    ),
)

METRIC_SCORES = Schema(
    "metric_scores",
    1,
    pa.schema(
        [
            *_PROMPT[:1],
            column("candidate", pa.int32(), "the image"),
            column("metric", pa.string(), "name of the metric"),
            column("score", pa.float32(), "in the metric's own unit; higher is better"),
        ]
    ),
)

JUDGED = Schema(
    "judged",
    1,
    pa.schema(
        [
            *_PROMPT[:1],
            column("candidate", pa.int32(), "the image"),
            column("reward", pa.float32(), "implicit reward with the judge's weights"),
            column("standard_error", pa.float32(), "of the reward, over draws", nullable=True),
        ]
    ),
)

_ERRORS = [
    column(f"{side}_{whose}_errors", pa.list_(pa.float32()), f"the {whose}'s error of each draw")
    for side in ("winner", "loser")
    for whose in ("policy", "reference")
]

HOLDOUT_REWARDS = Schema(
    "holdout_rewards",
    3,
    pa.schema(
        [
            column("pair_id", pa.string(), "a human pair that no training saw"),
            column("prompt_id", pa.string(), "its prompt, by which intervals are clustered"),
            column("winner_reward", pa.float32(), "implicit reward of the winner"),
            column("loser_reward", pa.float32(), "implicit reward of the loser"),
            column("probability", pa.float32(), "p(winner > loser), SAIL Eq. 9"),
            column("drift", pa.float32(), "mean squared change of the prediction from the base's"),
            *_ERRORS,
            column("timesteps", pa.list_(pa.int32()), "timestep of each draw"),
            column("num_timesteps", pa.int32(), "length of the model's noise schedule"),
        ]
    ),
)

TRAINING = Schema(
    "training",
    1,
    pa.schema(
        [
            column("step", pa.int32(), "optimizer update, from 1"),
            column("loss", pa.float32(), "mean over the batch's pairs; ln 2 = no preference"),
            column("implicit_accuracy", pa.float32(), "share of pairs with a logit above 0"),
            column("logit", pa.float32(), "mean preference logit"),
            column("winner_error", pa.float32(), "policy minus reference error of the winners"),
            column("loser_error", pa.float32(), "policy minus reference error of the losers"),
            column("gradient_norm", pa.float32(), "before the clip"),
            column("learning_rate", pa.float64(), "of this step"),
            column("pairs_per_second", pa.float32(), "speed of this step"),
        ]
    ),
)

HELD_OUT_CURVE = Schema(
    "held_out_curve",
    4,
    pa.schema(
        [
            column("step", pa.int32(), "optimizer updates so far; 0 is before the first"),
            column("accuracy", pa.float32(), "share of held-out pairs ranked as people do"),
            column("logit", pa.float32(), "mean preference logit of the held-out pairs"),
            column(
                "log_loss",
                pa.float32(),
                "least mean of log(1 + exp(-c logit)) over c from 0 to 1; ln 2 knows nothing",
            ),
            column("winner_error", pa.float32(), "policy minus reference error of the winners"),
            column("loser_error", pa.float32(), "policy minus reference error of the losers"),
            column(
                "pair_log_losses",
                pa.list_(pa.float32()),
                "log(1 + exp(-c logit)) of each held-out pair, with the c of log_loss",
            ),
        ]
    ),
)

_COMPARISON = [
    column("metric", pa.string(), "name of the metric"),
    column("policy", pa.string(), "'base', 'iter00', 'iter01' ..."),
    column(
        "baseline", pa.string(), "the policy it is compared with; '<run>/<policy>' of another run"
    ),
    column("num_prompts", pa.int32(), "prompts both were scored on"),
    column("mean", pa.float64(), "mean score of the policy over prompts"),
    column("baseline_mean", pa.float64(), "mean score of the baseline over prompts"),
    column("difference", pa.float64(), "mean paired difference, policy minus baseline"),
    column("ci_low", pa.float64(), "95 % bootstrap interval over prompts, lower end"),
    column("ci_high", pa.float64(), "95 % bootstrap interval over prompts, upper end"),
    column("win_rate", pa.float64(), "share of prompts won; a draw counts one half"),
    column("win_low", pa.float64(), "95 % Wilson interval of the win rate, lower end"),
    column("win_high", pa.float64(), "95 % Wilson interval of the win rate, upper end"),
    column("num_wins", pa.int32(), "prompts won"),
    column("num_ties", pa.int32(), "prompts with equal scores"),
    column("num_losses", pa.int32(), "prompts lost"),
    column("sign_p", pa.float64(), "exact two-sided sign test, draws left out"),
    column("wilcoxon_p", pa.float64(), "two-sided Wilcoxon signed-rank test"),
    column("effect_size", pa.float64(), "d_z, mean over standard deviation of the differences"),
]

SUMMARY = Schema(
    "evaluation_summary",
    3,
    pa.schema(
        [
            column("prompt_set", pa.string(), "evaluation prompts"),
            *_COMPARISON,
            column(
                "better_of_two",
                pa.float64(),
                "what keeping the better of two images of a prompt gains over one image of the "
                "baseline, by the metric; null with one image a prompt",
                nullable=True,
            ),
            column("sign_p_holm", pa.float64(), "sign_p adjusted for all rows of the prompt set"),
            column("wilcoxon_p_holm", pa.float64(), "wilcoxon_p, adjusted likewise"),
        ]
    ),
)

BREAKDOWN = Schema(
    "evaluation_breakdown",
    1,
    pa.schema(
        [
            column("prompt_set", pa.string(), "evaluation prompts"),
            column("axis", pa.string(), "'category' or 'challenge'"),
            column("group", pa.string(), "its value; the comparison is over its prompts alone"),
            *_COMPARISON,
        ]
    ),
)

LEAKAGE = Schema(
    "leakage",
    1,
    pa.schema(
        [
            column("prompt_set", pa.string(), "evaluation prompts"),
            column("source", pa.string(), "prompts that a training sees: 'seed', 'iter01' ..."),
            column("num_prompts", pa.int32(), "different prompts of the evaluation set"),
            column("num_shared", pa.int32(), "of them, those that the training sees too"),
            column("examples", pa.list_(pa.string()), "up to five of the shared ones"),
        ]
    ),
)

RELIABILITY = Schema(
    "reliability",
    1,
    pa.schema(
        [
            column("iteration", pa.int32(), "0 is the seed training"),
            column("policy", pa.string(), "the judge"),
            column("num_pairs", pa.int32(), "held-out pairs of this bin"),
            column("mean_probability", pa.float64(), "mean certainty, max(p, 1 - p)"),
            column("share_right", pa.float64(), "share it ranks as people do; half for p = 0.5"),
            column("share_low", pa.float64(), "95 % Wilson interval, lower end"),
            column("share_high", pa.float64(), "95 % Wilson interval, upper end"),
        ]
    ),
)

DIVERSITY = Schema(
    "diversity",
    2,
    pa.schema(
        [
            *_PROMPT[:1],
            column("num_images", pa.int32(), "images of the prompt"),
            column("num_blank", pa.int32(), "of them, those that are of nearly one colour"),
            column(
                "pixel_distance",
                pa.float64(),
                "root mean squared difference of two of them, mean over pairs, in [0, 1]",
                nullable=True,
            ),
            column(
                "feature_distance",
                pa.float64(),
                "difference of two of them in features or to the eye, mean over pairs",
                nullable=True,
            ),
            column(
                "features", pa.string(), "what feature_distance is of: the metric, or perceptual"
            ),
            column(
                "moved_pixels",
                pa.float64(),
                "root mean squared difference of an image from the base's of the same noise, mean "
                "over images, in [0, 1]; null for the base",
                nullable=True,
            ),
            column(
                "moved_features",
                pa.float64(),
                "the same in features or to the eye; null for the base",
                nullable=True,
            ),
        ]
    ),
)

LAB_RESULTS = Schema(
    "lab_results",
    1,
    pa.schema(
        [
            column("run", pa.string(), "name of the run in results/"),
            column("experiment", pa.string(), "the experiment that looks at it"),
            column("arm", pa.string(), "its arm there"),
            column("seed", pa.int64(), "run seed, which pairs the arms"),
            column("status", pa.string(), "'finished', 'not finished' or 'not begun'"),
            column("policy", pa.string(), "'base', 'iter00', 'iter01' ...", nullable=True),
            column("measure", pa.string(), "a metric's mean, or a guard", nullable=True),
            column("value", pa.float64(), "in the measure's own unit", nullable=True),
            column("command", pa.string(), "by which the run was made", nullable=True),
            column("commit", pa.string(), "of the code when it ended", nullable=True),
            column("machine", pa.string(), "kind of machine", nullable=True),
            column("run_seconds", pa.float64(), "of its last call", nullable=True),
        ]
    ),
)
