"""The tables of online training, and of a judge's: what was sampled and trained on, and how the training went."""

from __future__ import annotations

import pyarrow as pa

from stages.core.artifacts.schemas import Schema, column

TRANSITIONS = Schema(
    "transitions",
    1,
    pa.schema(
        [
            column("round", pa.int32(), "round of sampling and training, from 1"),
            column("place", pa.int32(), "number of the prompt in its round, from 0"),
            column("prompt_id", pa.string(), "digest of the normalised prompt"),
            column("prompt", pa.string(), "text as it is given to the model"),
            column("seed", pa.int64(), "decides all noise of this prompt's chains in this round"),
            column("candidate", pa.int32(), "ddpo: which of the prompt's images", nullable=True),
            column("inference_step", pa.int32(), "sampler step, from 0"),
            column("timestep", pa.int32(), "diffusion time before the step"),
            column(
                "scores",
                pa.list_(pa.float32()),
                "by the judge: of all candidates that were compared; ddpo: of the finished image",
            ),
            column("winner_candidate", pa.int32(), "spo, d3po: the best", nullable=True),
            column("loser_candidate", pa.int32(), "spo, d3po: the worst", nullable=True),
            column("next_candidate", pa.int32(), "spo: whose chain goes on", nullable=True),
            column(
                "advantage",
                pa.float32(),
                "ddpo: the score, less the mean, over the standard deviation",
                nullable=True,
            ),
            column("is_valid", pa.bool_(), "whether it was trained on"),
        ]
    ),
)

ONLINE_TRAINING = Schema(
    "online_training",
    1,
    pa.schema(
        [
            column("step", pa.int32(), "optimizer update, from 1"),
            column("round", pa.int32(), "the round whose transitions it trains on, from 1"),
            column("num_transitions", pa.int32(), "pairs of transitions; ddpo: transitions"),
            column("mean_score", pa.float32(), "by the judge, mean of all scores of the round"),
            column("valid_share", pa.float32(), "share of the round's comparisons that were clear"),
            column("loss", pa.float32(), "mean over the batch; spo, d3po: ln 2 = as the reference"),
            column(
                "log_ratio",
                pa.float32(),
                "mean log-ratio to the reference (winners), or to the policy that sampled (ddpo)",
            ),
            column("clipped_share", pa.float32(), "share of ratios beyond the clip"),
            column(
                "implicit_accuracy",
                pa.float32(),
                "share of pairs whose winner has the higher log-ratio",
                nullable=True,
            ),
            column("gradient_norm", pa.float32(), "before the clip"),
            column("learning_rate", pa.float64(), "of this step"),
            column("transitions_per_second", pa.float32(), "trained on, of this step"),
            column("sampling_seconds", pa.float32(), "sampling and judging of the round"),
        ]
    ),
)

STEP_JUDGE_TRAINING = Schema(
    "step_judge_training",
    1,
    pa.schema(
        [
            column("step", pa.int32(), "optimizer update, from 1"),
            column("loss", pa.float32(), "weighted mean over the batch; ln 2 = no opinion"),
            column(
                "accuracy",
                pa.float32(),
                "share of the batch's pairs judged as labelled, at random timesteps; ties count half",
            ),
            column("tie_share", pa.float32(), "share of the batch's pairs labelled a tie"),
            column("gradient_norm", pa.float32(), "before the clip"),
            column("learning_rate", pa.float64(), "of this step"),
            column("pairs_per_second", pa.float32(), "trained on, of this step"),
        ]
    ),
)

STEP_JUDGE_CURVE = Schema(
    "step_judge_curve",
    1,
    pa.schema(
        [
            column("step", pa.int32(), "optimizer update; 0 is the CLIP that it begins with"),
            column("timestep", pa.int32(), "how noisy the latents are; 0 is the finished image"),
            column("num_pairs", pa.int32(), "held-out human pairs"),
            column("accuracy", pa.float32(), "share judged as people did; equal scores count half"),
            column("log_loss", pa.float32(), "mean; ln 2 = no opinion"),
        ]
    ),
)
