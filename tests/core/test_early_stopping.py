"""A training that stops by its held-out pairs: when, with which weights, and after an interruption."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
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
from stages.core.training.early_stopping import BestWeights, best_score
from stages.core.training.held_out import HeldOut, HeldOutFiles, Progress, best_step, scores_of
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


def test_the_first_of_equal_scores_is_the_best() -> None:
    assert best_score([-0.69, -0.6, -0.5, -0.9, -0.5]) == 2
    assert best_score([-0.69]) == 0


def test_a_score_is_the_log_loss_which_sees_how_much_was_learnt() -> None:
    point = Progress(
        step=0, accuracy=1.0, logit=9.0, log_loss=0.69, winner_error=0.0, loser_error=0.0
    )
    assert scores_of([point, replace(point, accuracy=0.6, log_loss=0.5)]) == [-0.69, -0.5]
    assert best_step([point, replace(point, step=4, accuracy=0.6, log_loss=0.5)]) == 4


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


def test_patience_counts_the_scores_since_the_best() -> None:
    scores = [-0.69, -0.5, -0.6, -0.5, -0.7]
    weights = BestWeights([], patience=3)
    assert [weights.is_over(scores[:count]) for count in (1, 2, 3, 4, 5)] == [
        False,
        False,
        False,
        False,
        True,
    ]
    assert not BestWeights([], patience=0).is_over([-0.1, *[-0.9] * 50])


def test_scores_of_the_warmup_do_not_end_a_training() -> None:
    weights = BestWeights([], patience=2)
    scores = [-0.69, -0.7, -0.71, -0.72, -0.73]
    assert [weights.is_over(scores[:count], num_early=3) for count in (1, 2, 3, 4, 5)] == [
        False,
        False,
        False,
        False,
        True,
    ]
    late = [-0.69, -0.7, -0.71, -0.5, -0.73, -0.74]
    assert [weights.is_over(late[:count], num_early=3) for count in (5, 6)] == [False, True]


def test_the_weights_of_the_best_score_are_put_back() -> None:
    weight = torch.zeros(2)
    best = BestWeights([weight], patience=2)
    scores = []
    for value, score in enumerate([-0.69, -0.5, -0.6]):
        weight.fill_(value)
        scores.append(score)
        best.note(scores)
    best.put_back()
    assert weight.tolist() == [1.0, 1.0]


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
    return HeldOut(pairs=random_pairs(model, 8, seed=5), num_draws=1, every_steps=1, seed=6)


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


@pytest.mark.parametrize("lora", [FULL, LORA], ids=["full", "LoRA"])
def test_the_reference_is_asked_about_held_out_pairs_once_and_the_curve_is_the_same_to_the_bit(
    model: DiffusionModel, held_out: HeldOut, lora: LoraSettings
) -> None:
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
        found = kept.score(model, policy, reference, SETTINGS, step=step)
        assert asked == [6, 6, 4]
        reference.forward = network
        again = replace(kept).score(model, policy, reference, SETTINGS, step=step)
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


def test_a_training_ends_when_there_is_no_gain_with_the_weights_of_its_best_step(
    model: DiffusionModel, pairs: EncodedPairs, held_out: HeldOut, tmp_path: Path
) -> None:
    steps, curve, weights = train(model, pairs, held_out, tmp_path / "stopped")
    best = best_step(curve)
    assert 0 < best < len(steps) == best + 3 < 14
    whole, _, last = train(model, pairs, held_out, tmp_path / "whole", stop_after_no_gain=0)
    assert len(whole) == 14
    assert not same(weights, last)
    short, _, expected = train(
        model, pairs, None, tmp_path / "short", stop_after_no_gain=0, passes=best / 2
    )
    assert len(short) == best
    assert same(weights, expected)


def test_a_training_does_not_end_in_its_warmup(
    model: DiffusionModel, pairs: EncodedPairs, held_out: HeldOut, tmp_path: Path
) -> None:
    steps, curve, _ = train(
        model, pairs, held_out, tmp_path / "a", stop_after_no_gain=1, warmup_share=1.0
    )
    losses = [point.log_loss for point in curve]
    assert any(after >= before for before, after in pairwise(losses[:-1]))  # would have ended it
    assert len(steps) == 14


@pytest.mark.slow
def test_a_training_that_is_not_stopped_keeps_its_best_weights_too(
    model: DiffusionModel, pairs: EncodedPairs, held_out: HeldOut, tmp_path: Path
) -> None:
    steps, curve, weights = train(model, pairs, held_out, tmp_path / "a", stop_after_no_gain=99)
    assert len(steps) == 14
    _, _, expected = train(
        model, pairs, None, tmp_path / "b", stop_after_no_gain=0, passes=best_step(curve) / 2
    )
    assert same(weights, expected)


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
    point = Progress(
        step=0, accuracy=0.5, logit=0.0, log_loss=0.693, winner_error=0.0, loser_error=0.0
    )
    curve = [point, replace(point, step=5, accuracy=0.6, log_loss=0.7)]
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
