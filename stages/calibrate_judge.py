"""Held-out human pairs as a policy judges them in; how much each timestep shall count in its reward out.

Example: paste the line from logs/<run>/evaluation/calibrate_judge-iter00.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import tyro
from jaxtyping import Float, Int
from scipy.special import expit

from stages.core.artifacts.judges import JudgeRecord, facts_of
from stages.core.artifacts.provenance import policy_files, policy_name, write_record
from stages.core.artifacts.schemas import HOLDOUT_REWARDS
from stages.core.artifacts.tables import read_table, write_table
from stages.core.errors import UserError
from stages.core.evaluation.guard_tables import floats, prompts_of
from stages.core.evaluation.statistics import clustered_share_interval, compare
from stages.core.execution.runtime import log, run_stage, stage
from stages.core.method.calibration import (
    EQUAL,
    NUM_BINS,
    NUM_FOLDS,
    SHAPES,
    BinWeights,
    Shape,
    bin_features,
    cross_fitted,
    fit,
    log_losses,
    middle_weights,
    snr_weights,
)
from stages.core.method.noising import DrawLaw
from stages.core.method.rewards import weighted_mean
from stages.core.method.seeding import seed_of
from stages.core.models.loading import ModelSettings

FIXED = {"inverse_snr": "the SNR", "epsilon": "epsilon", "elbo": "the bound", "calibrated": "Eq. 8"}
"""What says what timesteps count where nothing can be fitted."""
MIN_PAIRS, MIN_PROMPTS = 50, 2 * NUM_FOLDS
"""Fewer say too little, or leave nothing to fit where a fold of a fold is left out: the weights stay equal."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Held-out human pairs as a policy judges them in, how much each timestep shall count out."""

    holdout: Path
    """Held-out pairs with every draw's errors (schema holdout_rewards)."""
    model: ModelSettings
    """The pretrained model, for its noise schedule."""
    policy: str
    """Policy folder that judges; its digest is kept with the weights."""
    weights: Literal["inverse_snr", "epsilon", "elbo", "calibrated"]
    """'inverse_snr': the noise's error times (1/SNR)^snr_power; of flow matching 'epsilon' or 'elbo'; 'calibrated':
    fitted to the pairs."""
    snr_power: float = 1.0
    """Only with inverse_snr."""
    draw_law: DrawLaw = "uniform"
    """How the timesteps of the held-out pairs were drawn."""
    seed: int
    """Evaluation seed, by which prompts go into folds."""
    judged: Path
    """Where the pairs go as this judge sees them, each by weights that did not see it (holdout_rewards)."""
    output: Path
    """Where the weights go (JSON)."""


def main(args: Args) -> None:
    """Fit the weights, and judge every pair by weights that were fitted without its prompt."""
    with stage("calibrate_judge") as run:
        table = read_table(args.holdout, HOLDOUT_REWARDS)
        pairs = HeldOut.of(table, args.holdout)
        fixed = np.ones(NUM_BINS)
        if args.weights == "inverse_snr":
            fixed = by_signal_to_noise(args.model, args.snr_power).weights
        elif args.weights != "calibrated":
            fixed = middle_weights(error_weights(args.model, args.weights)).weights
        shapes = SHAPES if args.weights == "calibrated" else (EQUAL,)
        num_pairs, num_prompts = len(pairs.prompts), len(np.unique(pairs.prompts))
        is_fitted = num_pairs >= MIN_PAIRS and num_prompts >= MIN_PROMPTS
        if not is_fitted:
            log.warning(
                "calibrate_judge: %s has %d pairs of %d prompts, and weights want at least %d of %d: all "
                "timesteps count as %s says; raise preferences.num_holdout",
                args.holdout, num_pairs, num_prompts, MIN_PAIRS, MIN_PROMPTS,
                FIXED[args.weights],
            )  # fmt: skip
        record, rows = (
            judged(pairs, fixed, shapes, args) if is_fitted else unfitted(pairs, fixed, args)
        )
        for name in ("winner_reward", "loser_reward", "probability"):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, pa.array(rows[name], pa.float32()))
        inputs = [args.holdout, *policy_files(args.policy)]
        write_record(
            args.output, facts_of(record), stage="calibrate_judge", arguments=args, inputs=inputs
        )
        write_table(
            args.judged, table.to_pylist(), HOLDOUT_REWARDS,
            stage="calibrate_judge", arguments=args, inputs=inputs,
        )  # fmt: skip
        run.rows_in = run.rows_out = len(table)


@dataclass(frozen=True)
class HeldOut:
    """The gains of held-out pairs: the reference's less the policy's error."""

    winner: Float[np.ndarray, "pair draw"]
    loser: Float[np.ndarray, "pair draw"]
    timesteps: Int[np.ndarray, "pair draw"]
    prompts: Int[np.ndarray, " pair"]
    num_timesteps: int
    plain_probability: Float[np.ndarray, " pair"]
    """By the plain mean and Eq. 9."""

    @classmethod
    def of(cls, table: pa.Table, path: Path) -> HeldOut:
        """UserError for a table without pairs, of several lengths of errors, or with a number that is none."""
        if len(table) == 0:
            raise UserError(
                f"{path} has no pairs, so no judge can be fitted; raise preferences.num_holdout"
            )
        names = [f"{side}_{whose}_errors" for side in ("winner", "loser")
                 for whose in ("policy", "reference")]  # fmt: skip
        lengths = {
            len(row) for name in (*names, "timesteps") for row in table.column(name).to_pylist()
        }
        if len(lengths) != 1:
            raise UserError(
                f"{path}: found errors of {', '.join(map(str, sorted(lengths)))} draws, expected one number; "
                "run score_holdout again"
            )
        errors = {name: np.array(table.column(name).to_pylist(), np.float64) for name in names}
        for name, values in errors.items():
            if not np.isfinite(values).all():
                row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                raise UserError(
                    f"{path}, row {row}: {name} are not finite; the policy has diverged, or "
                    "score_candidates.dtype is too narrow"
                )
        winner, loser = (
            errors[f"{side}_reference_errors"] - errors[f"{side}_policy_errors"]
            for side in ("winner", "loser")
        )
        return cls(
            winner=winner,
            loser=loser,
            timesteps=np.array(table.column("timesteps").to_pylist()),
            prompts=prompts_of(table),
            num_timesteps=table.column("num_timesteps")[0].as_py(),
            plain_probability=floats(table, "probability"),
        )

    @property
    def features(self) -> Float[np.ndarray, "pair bin"]:
        """Each bin's part of the plain mean's margin."""
        return bin_features(self.winner - self.loser, self.timesteps, self.num_timesteps)

    @property
    def spreads(self) -> tuple[float, ...]:
        """Root mean square of each bin's part of the margins."""
        return tuple(map(float, np.sqrt((self.features**2).mean(axis=0))))

    def for_rewards(self, weights: BinWeights) -> BinWeights:
        """The weights with the log-odds of a weighted mean, where the law of draws leaves bins of unequal share.

        They were fitted to the sum of the bins' parts, which is the weighted mean times the draws' mean weight.
        """
        share = np.mean([weights.of(each, self.num_timesteps).mean() for each in self.timesteps])
        return BinWeights(weights.weights, weights.log_odds * float(share))

    def rewards(self, weights: BinWeights, pairs: Int[np.ndarray, " chosen"]) -> list[np.ndarray]:
        """[winners', losers'] rewards of some pairs."""
        found = []
        for gains in (self.winner, self.loser):
            per_draw = [weights.of(self.timesteps[pair], self.num_timesteps) for pair in pairs]
            found.append(
                np.array([weighted_mean(gains[pair][None], each)[0][0]
                          for pair, each in zip(pairs, per_draw, strict=True)])
            )  # fmt: skip
        return found


Rows = dict[str, np.ndarray]


def judged(
    pairs: HeldOut, fixed: np.ndarray, shapes: tuple[Shape, ...], args: Args
) -> tuple[JudgeRecord, Rows]:
    """The weights of all pairs, and each pair as weights of other prompts judge it."""
    features = pairs.features
    rng = np.random.default_rng(seed_of(args.seed, "calibrate_judge"))
    rows = {name: np.zeros(len(features)) for name in ("winner_reward", "loser_reward")}
    logits, plain_losses = np.zeros((2, len(features)))
    for chosen, found in cross_fitted(features * fixed, pairs.prompts, rng, shapes):
        weights = found.times(fixed)
        if args.draw_law != "uniform":
            weights = pairs.for_rewards(weights)
        rows["winner_reward"][chosen], rows["loser_reward"][chosen] = pairs.rewards(weights, chosen)
        margins = rows["winner_reward"][chosen] - rows["loser_reward"][chosen]
        logits[chosen] = margins * weights.log_odds
    for chosen, found in cross_fitted(features, pairs.prompts, rng, (EQUAL,)):
        plain_losses[chosen] = log_losses(
            (features[chosen] * found.weights).sum(axis=1) * found.log_odds
        )
    final, shape = fit(features * fixed, pairs.prompts, rng, shapes)
    final = final.times(fixed)
    if args.draw_law != "uniform":
        final = pairs.for_rewards(final)
    plain, ours = (
        points_of(margins)
        for margins in (features.sum(axis=1), rows["winner_reward"] - rows["loser_reward"])
    )
    better = compare(ours, plain, clusters=pairs.prompts)
    low, high = clustered_share_interval(ours, pairs.prompts)
    record = JudgeRecord(
        policy=policy_name(args.policy),
        kind=args.weights,
        weights=tuple(map(float, final.weights)),
        log_odds=final.log_odds,
        num_timesteps=pairs.num_timesteps,
        num_pairs=len(features),
        spreads=pairs.spreads,
        spread_power=shape.power,
        step=shape.step,
        accuracy=float(ours.mean()), accuracy_low=low, accuracy_high=high,
        plain_accuracy=float(plain.mean()),
        accuracy_gain_low=better.ci_low, accuracy_gain_high=better.ci_high,
        log_loss=float(log_losses(logits).mean()), plain_log_loss=float(plain_losses.mean()),
    )  # fmt: skip
    log.info(
        "calibrate_judge: ranks %.1f %% of %d held-out pairs as people do, by weights that did not see them "
        "(equal weights: %.1f %%; difference %+.1f to %+.1f); log-loss %.3f (%.3f); weights %s",
        100 * record.accuracy, record.num_pairs, 100 * plain.mean(), 100 * better.ci_low,
        100 * better.ci_high, record.log_loss, record.plain_log_loss,
        " ".join(f"{weight:.2f}" for weight in record.weights),
    )  # fmt: skip
    return record, rows | {"probability": expit(logits)}


def unfitted(pairs: HeldOut, fixed: np.ndarray, args: Args) -> tuple[JudgeRecord, Rows]:
    """The fixed weights, and p by Eq. 9."""
    everyone = np.arange(len(pairs.prompts))
    winner, loser = pairs.rewards(BinWeights(fixed), everyone)
    points = points_of(winner - loser)
    low, high = clustered_share_interval(points, pairs.prompts)
    record = JudgeRecord(
        policy=policy_name(args.policy),
        kind=args.weights,
        weights=tuple(map(float, fixed)),
        log_odds=None,
        num_timesteps=pairs.num_timesteps,
        num_pairs=len(points),
        spreads=pairs.spreads,
        accuracy=float(points.mean()), accuracy_low=low, accuracy_high=high,
    )  # fmt: skip
    rows = {"winner_reward": winner, "loser_reward": loser, "probability": pairs.plain_probability}
    return record, rows


def points_of(margins: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """1 where the winner is preferred, one half in a tie."""
    return (margins > 0) + 0.5 * (margins == 0)


def error_weights(settings: ModelSettings, name: str) -> Float[np.ndarray, " timestep"]:
    """What the model's family lets an error count at every timestep."""
    import torch  # slow to import, and wanted for this alone

    from stages.core.models.families import load_model

    model = load_model(settings, device=torch.device("cpu"))
    return np.asarray(model.error_weights(name).numpy(), np.float64)


def by_signal_to_noise(settings: ModelSettings, power: float) -> BinWeights:
    """What each bin counts if the noise's error counts (1/SNR)^power, whatever the model predicts."""
    import torch  # slow to import, and wanted for this alone

    from stages.core.models.families import load_model
    from stages.core.models.flow import FlowModel

    model = load_model(settings, device=torch.device("cpu"))
    if isinstance(model, FlowModel):
        return middle_weights(np.asarray(model.snr_weights(power).numpy(), np.float64))
    return snr_weights(np.asarray(model.signal_to_noise.numpy(), np.float64), power)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
