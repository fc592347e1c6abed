"""How much each timestep counts in the implicit reward: fixed weights, or weights fitted to human pairs.

The reward of Eq. 8 is the plain mean over draws, in which the timesteps with the largest errors speak loudest,
whatever they know. Here each bin of timesteps has a weight. Let x_b be a bin's part of the reward of the
preferred image minus that of the other, over labelled pairs that no training saw, and s_b its spread. Tried are

    weights s_b^-q              equal ones (q = 0) to those of independent measurements of one thing (q = 2)
    weights s_b^-q exp(u_b)     with u of most likelihood under p = sigmoid(sum over bins of v_b * x_b),
                                v_b = c s_b^-q exp(u_b), and a penalty on the steps u_b+1 - u_b

and the log-loss under cross-validation over prompts chooses. Equal weights stay unless others are better by a
standard error. None is negative: no timestep counts against itself.

Differs from the paper: Eq. 8 has equal weights, and Eq. 7 weights that its derivation drops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

NUM_BINS = 10
"""Bins of timesteps of equal width: as many as the paper has draws."""


@dataclass(frozen=True)
class Shape:
    """How far weights may be from equal ones."""

    power: float = 0.0
    """q: weights are the spreads' power -q."""
    step: float = 0.0
    """Standard deviation of a step between the logarithms of neighbouring weights; 0 leaves them at the
    spreads' powers."""


EQUAL = Shape()
SHAPES = tuple(
    Shape(power, step) for step in (0.0, 0.3, 1.0) for power in (0.0, 0.5, 1.0, 1.5, 2.0)
)
NUM_REPEATS = 3
"""Of the cross-validation, each with folds of its own."""
NUM_FOLDS = 5
LARGEST_LOG = 14.0
"""How far a weight's logarithm may be from that of the best equal weights."""

Features = Float[np.ndarray, "pair bin"]
Weights = Float[np.ndarray, " bin"]
Folds = Int[np.ndarray, " pair"]


@dataclass(frozen=True)
class BinWeights:
    """What each bin of timesteps counts in a reward, and what the reward then says."""

    weights: Weights
    """One for each bin of equal width, none negative; their mean is 1."""
    log_odds: float = float("nan")
    """log-odds that one image is preferred, for each unit by which its reward is higher; nan: not fitted."""

    def of(
        self, timesteps: Int[np.ndarray, " draw"], num_timesteps: int
    ) -> Float[np.ndarray, " draw"]:
        """The weight of each draw. ValueError for timesteps that are not below num_timesteps."""
        if len(timesteps) and not 0 <= timesteps.min() <= timesteps.max() < num_timesteps:
            raise ValueError(
                f"timesteps reach from {timesteps.min()} to {timesteps.max()}, expected 0 to "
                f"{num_timesteps - 1}"
            )
        return self.weights[timesteps * len(self.weights) // num_timesteps]

    def times(self, fixed: Weights) -> BinWeights:
        """The weights that give the same log-odds where features were multiplied by fixed ones before."""
        weights = self.weights * fixed
        mean = float(weights.mean())
        return BinWeights(weights / mean, self.log_odds * mean)


def snr_weights(signal_to_noise: Float[np.ndarray, " timestep"], power: float) -> BinWeights:
    """(1/SNR)^power at the middle of each bin; power 1 is the error of x_0 instead of that of the noise."""
    middles = ((np.arange(NUM_BINS) + 0.5) / NUM_BINS * len(signal_to_noise)).astype(int)
    weights = signal_to_noise[middles] ** -power
    return BinWeights(weights / weights.mean())


def middle_weights(per_timestep: Float[np.ndarray, " timestep"]) -> BinWeights:
    """What the timestep in the middle of each bin counts."""
    middles = ((np.arange(NUM_BINS) + 0.5) / NUM_BINS * len(per_timestep)).astype(int)
    weights = per_timestep[middles]
    return BinWeights(weights / weights.mean())


def bin_features(
    gains: Float[np.ndarray, "pair draw"],
    timesteps: Int[np.ndarray, "pair draw"],
    num_timesteps: int,
) -> Features:
    """Each bin's part of the mean over draws: with equal weights their sum is the plain mean."""
    bins = timesteps * NUM_BINS // num_timesteps
    parts = [np.where(bins == number, gains, 0.0).mean(axis=1) for number in range(NUM_BINS)]
    return np.stack(parts, axis=1)


def fit(
    features: Features,
    prompts: Int[np.ndarray, " pair"],
    rng: np.random.Generator,
    shapes: Sequence[Shape] = SHAPES,
) -> tuple[BinWeights, Shape]:
    """(weights, the shape that cross-validation chose among `shapes`, of which the first is the simplest)."""
    chosen = shapes[0]
    if len(shapes) > 1:
        repeats = [folds_by_prompt(prompts, rng) for _ in range(NUM_REPEATS)]
        losses = {shape: held_out_losses(features, repeats, shape) for shape in shapes}
        gains = {shape: losses[chosen] - losses[shape] for shape in shapes[1:]}
        clear = {shape: gain for shape, gain in gains.items()
                 if gain.mean() > gain.std() / np.sqrt(len(gain))}  # fmt: skip
        chosen = max(clear, key=lambda shape: clear[shape].mean(), default=chosen)
    slopes = fit_shape(features, chosen)
    mean = float(slopes.mean())
    return BinWeights(slopes / mean, mean), chosen


def held_out_losses(
    features: Features, repeats: Sequence[Folds], shape: Shape
) -> Float[np.ndarray, " pair"]:
    """The log-loss of each pair by weights that were fitted without its fold, mean over repeats."""
    found = np.zeros((len(repeats), len(features)))
    for losses, folds in zip(found, repeats, strict=True):
        for fold in np.unique(folds):
            is_held_out = folds == fold
            slopes = fit_shape(features[~is_held_out], shape)
            losses[is_held_out] = log_losses(features[is_held_out] @ slopes)
    return found.mean(axis=0)


def fit_shape(features: Features, shape: Shape) -> Weights:
    """The slopes v of most likelihood that a shape allows."""
    spreads = np.sqrt((features**2).mean(axis=0))
    is_used = spreads > 0
    if not is_used.any():  # a judge without an opinion: two equal models
        return np.ones_like(spreads)
    base = np.zeros_like(spreads)
    base[is_used] = (spreads[is_used] / spreads[is_used].max()) ** -shape.power
    scaled = features * base
    unit = float(np.sqrt(np.mean(scaled.sum(axis=1) ** 2))) or 1.0
    scaled = scaled / unit
    start = _best_equal(scaled.sum(axis=1))
    if shape.step == 0.0:
        return base * np.exp(start) / unit
    strength = 1 / (len(features) * shape.step**2)

    def loss(logs: Weights) -> tuple[float, Weights]:
        slopes, jumps = np.exp(logs), np.diff(logs)
        logits = scaled @ slopes
        value = log_losses(logits).mean() + strength / 2 * (jumps**2).sum()
        slope = -(special.expit(-logits) @ scaled) / len(scaled) * slopes
        slope += strength * (np.r_[0.0, jumps] - np.r_[jumps, 0.0])
        return float(value), slope

    found = optimize.minimize(
        loss, np.full(features.shape[1], start), jac=True, method="L-BFGS-B",
        bounds=[(start - LARGEST_LOG, start + LARGEST_LOG)] * features.shape[1],
    )  # fmt: skip
    return base * np.exp(found.x) / unit


def _best_equal(margins: Float[np.ndarray, " pair"]) -> float:
    """The logarithm of the equal slope of most likelihood."""
    found = optimize.minimize_scalar(
        lambda log: log_losses(margins * np.exp(log)).mean(), bounds=(-8.0, 8.0), method="bounded"
    )
    return float(found.x)


def log_losses(logits: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """-log p of each pair's winner being preferred."""
    return np.logaddexp(0.0, -logits)


def softened_log_loss(logits: Float[np.ndarray, " pair"]) -> tuple[float, float]:
    """(log-loss, c): the least mean log-loss of c times the logits, with c from 0 to 1.

    Margins that are too large for how often they are right are forgiven: only their order of size and
    their signs count then. Margins that are too small are not made larger, so a policy that hardly differs from
    its reference scores hardly better than ln 2, which is what c = 0 gives.
    """

    def slope(share: float) -> float:
        return -float((logits * special.expit(-share * logits)).mean())

    if not slope(0.0) < 0:
        share = 0.0
    elif slope(1.0) <= 0:
        share = 1.0
    else:  # the loss is convex
        share = float(optimize.brentq(slope, 0.0, 1.0))
    return float(log_losses(share * logits).mean()), share


def folds_by_prompt(prompts: Int[np.ndarray, " pair"], rng: np.random.Generator) -> Folds:
    """A fold for each pair; pairs of one prompt share theirs."""
    different = np.unique(prompts)
    shuffled = rng.permutation(len(different)) % NUM_FOLDS
    return shuffled[np.searchsorted(different, prompts)]


def cross_fitted(
    features: Features,
    prompts: Int[np.ndarray, " pair"],
    rng: np.random.Generator,
    shapes: Sequence[Shape] = SHAPES,
) -> list[tuple[Int[np.ndarray, " chosen"], BinWeights]]:
    """For each fold: its pairs, and weights of which all, the shape too, was fitted to the other folds."""
    folds = folds_by_prompt(prompts, rng)
    found = []
    for fold in np.unique(folds):
        others = folds != fold
        weights, _ = fit(features[others], prompts[others], rng, shapes)
        found.append((np.flatnonzero(~others), weights))
    return found
