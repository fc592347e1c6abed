"""A training that stops by its held-out pairs: when, with which weights, and after an interruption."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.core.errors import UserError
from stages.core.method.calibration import softened_log_loss
from stages.core.method.noising import generator
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LoraSettings
from stages.core.policies.encoding import EncodedPairs
from stages.core.training.early_stopping import KeptWeights, Score, kept_score, standard_error
from stages.core.training.held_out import HeldOut, HeldOutFiles, Progress, kept_step, scores_of
from stages.core.training.loop import Step, Training
from stages.core.training.processes import Processes
from stages.core.training.run import Task, refuse_untouched
from stages.core.training.settings import Execution, TrainingSettings
from tests.builders import CAPTIONS, FULL, LORA
from tests.failing_model import Interrupted, failing

CPU = torch.device("cpu")
SETTINGS = TrainingSettings(
    dpo_beta=100.0,
    learning_rate=3e-4,
    batch_pairs=2,
    passes=7.0,
    warmup_share=0.0,
    gradient_clip=1.0,
    weight_decay=0.01,
    caption_dropout=0.0,
    stop_after_no_gain=3,
)


def losses(*means: float, spread: float = 0.0) -> list[Score]:
    """A score of four pairs for each mean: two pairs above it by the spread, two below, in turn."""
    signs = np.array([1.0, -1.0, 1.0, -1.0])
    return [mean + spread * (-1) ** place * signs for place, mean in enumerate(means)]


def test_of_scores_that_differ_without_doubt_the_lowest_is_kept() -> None:
    assert kept_score(losses(0.69, 0.6, 0.5, 0.9, 0.51)) == 2
    assert kept_score(losses(0.69, 0.6, 0.5, 0.9, 0.5)) == 4  # no worse
    assert kept_score(losses(0.69)) == 0


def test_of_scores_that_the_pairs_cannot_tell_apart_the_latest_is_kept() -> None:
    # neighbours differ by +-0.1 and a mean: with four pairs the standard error is 0.1 x sqrt(4/3) / 2 = 0.0577
    scores = losses(0.69, 0.5, 0.555, spread=0.05)
    assert standard_error(scores[2] - scores[1]) == pytest.approx(0.1 * np.sqrt(4 / 3) / 2)
    assert kept_score(scores) == 2
    assert kept_score(losses(0.69, 0.5, 0.56, spread=0.05)) == 1
    assert kept_score([np.array([0.6]), np.array([0.5]), np.array([0.51])]) == 1  # one pair


def test_where_no_score_is_lower_than_the_starts_the_start_is_kept() -> None:
    assert kept_score(losses(0.69, 0.70, 0.69, spread=0.5)) == 0


def test_a_score_is_the_log_loss_of_each_pair_which_sees_how_much_was_learnt() -> None:
    curve = [point(0, 0.69, 0.71), point(4, 0.4, 0.6), point(8, 0.8, 0.9)]
    assert [score.tolist() for score in scores_of(curve)] == [[0.69, 0.71], [0.4, 0.6], [0.8, 0.9]]
    assert kept_step(curve) == 4


def point(step: int, *pair_log_losses: float) -> Progress:
    return Progress(
        step=step,
        accuracy=0.6,
        logit=9.0,
        log_loss=float(np.mean(pair_log_losses)),
        winner_error=0.0,
        loser_error=0.0,
        pair_log_losses=pair_log_losses,
    )


def test_a_log_loss_is_softened_as_far_as_it_falls_and_never_sharpened() -> None:
    sure = np.array(
        [30.0, 30.0, 30.0, -30.0]
    )  # three of four are right, and all are called certain
    loss, share = softened_log_loss(sure)
    # at the best c each winner has p = 3/4: entropy of a coin that falls so, c = ln(3) / 30
    assert loss == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), abs=1e-9)
    assert share == pytest.approx(np.log(3) / 30, rel=1e-6)
    small = 1e-4 * sure  # the same order, of a policy that hardly moved
    loss, share = softened_log_loss(small)
    assert share == 1.0
    assert loss == pytest.approx(np.log(2) - 0.5 * small.mean(), abs=1e-5)
    assert softened_log_loss(-sure) == (pytest.approx(np.log(2)), 0.0)
    assert softened_log_loss(np.zeros(4)) == (pytest.approx(np.log(2)), 0.0)


def test_the_log_loss_of_a_policy_that_is_its_reference_is_ln_2(
    model: DiffusionModel, held_out: HeldOut
) -> None:
    policy = model.load_denoiser()
    point = held_out.score(model, policy, model.load_denoiser(), SETTINGS, step=0)
    assert point.log_loss == pytest.approx(np.log(2), abs=1e-6)
    assert (point.accuracy, point.logit) == (0.5, 0.0)


def test_the_log_losses_of_the_pairs_have_the_mean_that_is_shown(
    model: DiffusionModel, held_out: HeldOut
) -> None:
    policy = model.load_denoiser()
    with torch.no_grad():
        for weight in policy.network.parameters():
            weight.mul_(1.01)
    point = held_out.score(model, policy, model.load_denoiser(), SETTINGS, step=3)
    assert len(point.pair_log_losses) == len(held_out.pairs)
    assert len(set(point.pair_log_losses)) > 1
    assert point.log_loss == pytest.approx(np.mean(point.pair_log_losses))
    assert "pair_log_losses" not in point.measures
    assert point.measures["log_loss"] == point.log_loss


def over(weights: KeptWeights, scores: list[Score], **how: int) -> list[bool]:
    return [weights.is_over(scores[: count + 1], **how) for count in range(len(scores))]


def test_patience_counts_the_scores_since_the_kept_one() -> None:
    scores = losses(0.69, 0.5, 0.6, 0.5, 0.7, 0.7, 0.7)
    assert over(KeptWeights([], patience=3), scores) == [False] * 6 + [True]
    assert not KeptWeights([], patience=0).is_over(losses(0.1, *[0.9] * 50))


def test_scores_of_the_warmup_do_not_end_a_training() -> None:
    weights = KeptWeights([], patience=2)
    assert over(weights, losses(0.69, 0.7, 0.71, 0.72, 0.73), num_early=3) == [False] * 4 + [True]
    late = losses(0.69, 0.7, 0.71, 0.5, 0.73, 0.74)
    assert over(weights, late, num_early=3)[4:] == [False, True]


def test_the_weights_of_the_kept_score_are_put_back() -> None:
    weight = torch.zeros(2)
    kept = KeptWeights([weight], patience=2)
    scores: list[Score] = []
    for value, score in enumerate(losses(0.69, 0.5, 0.6)):
        weight.fill_(value)
        scores.append(score)
        kept.note(scores)
    kept.put_back()
    assert weight.tolist() == [1.0, 1.0]


def test_what_was_noted_last_is_what_is_kept_in_the_end() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = list(rng.normal(0.6, 0.1, (9, 12)) + rng.normal(0, 0.05, (9, 1)))
        noted = [n for n in range(9) if kept_score(scores[: n + 1]) == n]
        assert noted[-1] == kept_score(scores)


def random_pairs(model: DiffusionModel, count: int, seed: int) -> EncodedPairs:
    both = torch.randn((2, count, *model.latents_shape), generator=generator(seed))
    return EncodedPairs(
        winner=both[0],
        loser=both[1],
        caption=torch.arange(count) % 3,
        text=model.encode_text([*CAPTIONS[:3], ""]),
        winner_geometry=model.native_geometry(count),
        loser_geometry=model.native_geometry(count),
    )


@pytest.fixture(scope="module")
def pairs(model: DiffusionModel) -> EncodedPairs:
    """Four pairs of noise to learn by heart."""
    return random_pairs(model, 4, seed=2)


@pytest.fixture(scope="module")
def held_out(model: DiffusionModel) -> HeldOut:
    """Eight others, which nothing can be learnt about."""
    return HeldOut(pairs=random_pairs(model, 8, seed=7), num_draws=1, every_steps=1, seed=6)


def train(
    model: DiffusionModel,
    pairs: EncodedPairs,
    held_out: HeldOut | None,
    work: Path,
    **changes: object,
) -> tuple[list[Step], list[Progress], dict[str, Tensor]]:
    policy = model.load_denoiser()
    steps, curve = Training(
        model,
        policy,
        model.load_denoiser(),
        pairs,
        replace(SETTINGS, **changes),
        seed=3,
        work=work,
        identity="one",
        processes=Processes(CPU),
        execution=Execution(save_every=2),
        held_out=held_out,
    ).run()
    return steps, curve, policy.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("lora", "weights"), [(FULL, "uniform"), (LORA, "uniform"), (LORA, "elbo")]
)
def test_the_reference_is_asked_about_held_out_pairs_once_and_the_curve_is_the_same_to_the_bit(
    model: DiffusionModel,
    held_out: HeldOut,
    monkeypatch: pytest.MonkeyPatch,
    lora: LoraSettings,
    weights: Any,
) -> None:
    settings = replace(SETTINGS, weights=weights)
    if weights != "uniform":  # of flow matching; any will do
        monkeypatch.setattr(model, "error_weights", lambda name: torch.linspace(0.5, 2, 1000))
    policy, reference = model.load_for_training(None, None, lora, seed=0)
    network, asked = reference.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(len(args[0]))
        return network(*args, **kwargs)

    reference.forward = counted
    kept = replace(held_out, rows_per_batch=3)  # eight pairs, both images of each: 6, 6 and 4 rows
    for step in range(3):
        with torch.no_grad():
            for weight in policy.trainable():
                weight += 1e-3 * torch.randn(weight.shape, generator=generator(step))
        found = kept.score(model, policy, reference, settings, step=step)
        assert asked == [6, 6, 4]
        reference.forward = network
        again = replace(kept).score(model, policy, reference, settings, step=step)
        reference.forward = counted
        assert found == again
        assert found.winner_error != 0


def test_another_reference_is_asked_itself(model: DiffusionModel, held_out: HeldOut) -> None:
    policy, one, other = (model.load_denoiser() for _ in range(3))
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    kept = replace(held_out)
    assert kept.score(model, policy, one, SETTINGS, step=0).winner_error == 0
    assert kept.score(model, policy, other, SETTINGS, step=0).winner_error != 0


def test_a_training_ends_when_it_judges_worse_with_the_weights_of_the_kept_step(
    model: DiffusionModel, pairs: EncodedPairs, held_out: HeldOut, tmp_path: Path
) -> None:
    steps, curve, weights = train(model, pairs, held_out, tmp_path / "stopped")
    best = kept_step(curve)
    assert 0 < best < len(steps) == best + 3 < 14
    whole, _, last = train(model, pairs, held_out, tmp_path / "whole", stop_after_no_gain=0)
    assert len(whole) == 14
    assert not same(weights, last)
    short, _, expected = train(
        model, pairs, None, tmp_path / "short", stop_after_no_gain=0, passes=best / 2
    )
    assert len(short) == best
    assert same(weights, expected)


@pytest.mark.slow
def test_a_training_does_not_end_in_its_warmup(
    model: DiffusionModel, pairs: EncodedPairs, held_out: HeldOut, tmp_path: Path
) -> None:
    worse = replace(held_out, pairs=random_pairs(model, 8, seed=13))  # judged wrongly throughout
    steps, curve, _ = train(
        model, pairs, worse, tmp_path / "a", stop_after_no_gain=1, warmup_share=1.0
    )
    assert KeptWeights([], 1).is_over(scores_of(curve)[:2])  # would have ended it
    assert len(steps) == 14


@pytest.mark.slow
def test_a_training_that_is_not_stopped_takes_its_kept_weights_too(
    model: DiffusionModel, pairs: EncodedPairs, held_out: HeldOut, tmp_path: Path
) -> None:
    steps, curve, weights = train(model, pairs, held_out, tmp_path / "a", stop_after_no_gain=99)
    assert len(steps) == 14
    _, _, expected = train(
        model, pairs, None, tmp_path / "b", stop_after_no_gain=0, passes=kept_step(curve) / 2
    )
    assert same(weights, expected)


@pytest.mark.slow
def test_an_interrupted_training_stops_at_the_same_step_with_the_same_weights(
    tiny_base: str, model: DiffusionModel, pairs: EncodedPairs, held_out: HeldOut, tmp_path: Path
) -> None:
    steps, curve, weights = train(model, pairs, held_out, tmp_path / "unbroken")
    for stop_at in (7, 2 * len(steps)):
        with pytest.raises(Interrupted):
            train(failing(tiny_base, stop_at), pairs, held_out, tmp_path / str(stop_at))
        assert (tmp_path / str(stop_at) / "state.json").is_file()
        again, same_curve, same_weights = train(model, pairs, held_out, tmp_path / str(stop_at))
        assert [asdict(point) for point in same_curve] == [asdict(point) for point in curve]
        assert len(again) == len(steps)
        assert same(same_weights, weights)


def test_stopping_needs_scores_of_what_is_kept(
    model: DiffusionModel, pairs: EncodedPairs, held_out: HeldOut, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no held-out pairs are scored"):
        train(model, pairs, None, tmp_path)
    with pytest.raises(UserError, match="ema_decay an average that was not"):
        train(model, pairs, held_out, tmp_path, ema_decay=0.9)


def test_a_seed_training_without_gain_is_no_policy_and_an_update_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    curve = [point(0, 0.693), point(5, 0.7)]
    task = Task(
        stage="train_seed",
        arguments=None,
        inputs=[],
        initial="base",
        reference="base",
        lora=FULL,
        seed=0,
        held_out=HeldOutFiles(preferences=Path("holdout"), latents=Path("latents")),
        held_out_seed=0,
    )
    with pytest.raises(
        UserError, match="none of 1 scores .* better than the base.*No policy was written"
    ):
        refuse_untouched(task, curve)
    refuse_untouched(replace(task, initial="results/a/iter00/policy"), curve)
    assert "results/a/iter00/policy is handed on as it was" in caplog.text
