"""What a single wrong line would change, and no formula's test would see: each was once a silent mutant."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from stages.core.artifacts.schemas import HOLDOUT_REWARDS
from stages.core.artifacts.tables import write_table
from stages.core.evaluation.guard_tables import Evidence, GuardTables
from stages.core.evaluation.judge_guards import (
    change_sentence,
    measure_accuracy,
    measure_best,
    measure_change,
    measure_confidence,
)
from stages.core.method.calibration import softened_log_loss
from stages.core.method.noising import generator
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from stages.core.policies.encoding import EncodedPairs
from stages.core.training.held_out import HeldOut
from stages.core.training.loop import Training
from stages.core.training.optimizers import make_optimizer
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings
from tests import tiny_models
from tests.builders import CAPTIONS, settings

CPU = torch.device("cpu")
SETTINGS = TrainingSettings(
    dpo_beta=100.0, learning_rate=1e-3, batch_pairs=2, passes=1.0, warmup_share=0.0,
    gradient_clip=1.0, weight_decay=0.0, caption_dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs(model: DiffusionModel) -> EncodedPairs:
    """Two pairs of random latents: a pass is one step."""
    both = torch.randn((2, 2, *model.latents_shape), generator=generator(2))
    return EncodedPairs(
        winner=both[0], loser=both[1], caption=torch.arange(2),
        text=model.encode_text([*CAPTIONS[:2], ""]),
        winner_geometry=model.native_geometry(2), loser_geometry=model.native_geometry(2),
    )  # fmt: skip


def trained(
    model: DiffusionModel, pairs: EncodedPairs, work: Path, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights before and after."""
    policy = model.load_denoiser()
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    Training(
        model, policy, model.load_denoiser(), pairs, replace(SETTINGS, **changes), seed=3, work=work,
        identity="one", processes=Processes(CPU), execution=Execution(),
    ).run()  # fmt: skip
    return before, policy.state_dict()


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((after[name] - before[name]).abs().max()) for name in before)


def test_an_average_of_the_weights_is_stepped(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    before, last = trained(model, pairs, tmp_path / "last", passes=2.0)
    start, averaged = trained(model, pairs, tmp_path / "average", passes=2.0, ema_decay=0.9)
    assert largest_change(start, averaged) > 0.1 * SETTINGS.learning_rate
    assert largest_change(last, averaged) > 0.01 * SETTINGS.learning_rate
    assert largest_change(before, start) == 0


def test_a_gradient_is_clipped(model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path) -> None:
    """AdamW's first step is the learning rate whatever the gradient, down to its epsilon of 1e-8."""
    free = largest_change(*trained(model, pairs, tmp_path / "free"))
    clipped = largest_change(*trained(model, pairs, tmp_path / "clipped", gradient_clip=1e-10))
    assert free == pytest.approx(SETTINGS.learning_rate, rel=0.01)
    assert clipped < 0.02 * SETTINGS.learning_rate


def test_a_step_of_the_warmup_takes_its_share_of_the_learning_rate(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    """AdamW moves a weight by the learning rate in a step at most: twice it in two, 1.5 times it in a warmup of two."""
    plain = largest_change(*trained(model, pairs, tmp_path / "plain", passes=2.0))
    warmed = largest_change(*trained(model, pairs, tmp_path / "warm", passes=2.0, warmup_share=1.0))
    assert plain > 1.7 * SETTINGS.learning_rate
    assert warmed < 1.52 * SETTINGS.learning_rate


def test_weights_decay_by_the_learning_rate_times_the_decay(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    before, plain = trained(model, pairs, tmp_path / "plain")
    _, decayed = trained(model, pairs, tmp_path / "decayed", weight_decay=0.5)
    for name, weight in before.items():
        expected = plain[name] - SETTINGS.learning_rate * 0.5 * weight
        torch.testing.assert_close(decayed[name], expected, atol=3e-7, rtol=0)


def evidence(**known: Any) -> Evidence:
    """What an iteration left, already read."""
    found = Evidence(GuardTables(holdout={}, diversity={}, pairs={}), 1)
    found.__dict__.update(known)
    return found


def test_a_judge_without_an_opinion_is_half_right() -> None:
    table = pa.table(
        {
            "prompt_id": ["a", "b", "c", "d"],
            "winner_reward": [0.0, 0.0, 1.0, -1.0],
            "loser_reward": [0.0, 0.0, 0.0, 0.0],
        }
    )
    found = measure_accuracy(evidence(held_out=table))
    assert found["reward_accuracy"] == 0.5  # two ties, one right, one wrong
    found = measure_accuracy(evidence(held_out=table.slice(0, 2)))
    assert found["reward_accuracy"] == 0.5
    assert found["reward_accuracy_low"] < 0.5 < found["reward_accuracy_high"]


def judged_pairs(path: Path, rights: list[bool | None], first: int) -> Path:
    """Held-out pairs by name from a number on, each ranked as people do or not, or None for not at all."""
    rows: list[dict[str, Any]] = [
        {
            "pair_id": f"pair {first + number}",
            "prompt_id": f"pair {first + number}",
            "winner_reward": 0.0 if right is None else 1.0 if right else -1.0,
            "loser_reward": 0.0,
            "probability": 0.5,
            "drift": 0.0,
            "timesteps": [],
            "num_timesteps": 1000,
            **{f"{side}_{whose}_errors": [] for side in ("winner", "loser")
               for whose in ("policy", "reference")},
        }
        for number, right in enumerate(rights)
    ]  # fmt: skip
    write_table(path, rows, HOLDOUT_REWARDS, stage="score_holdout", arguments={})
    return path


def change(
    folder: Path, then: list[bool | None], now: list[bool | None], first: int = 0
) -> dict[str, Any]:
    """The change of accuracy in an iteration 2 after an iteration 0."""
    holdout = {
        0: judged_pairs(folder / "then.parquet", then, 0),
        2: judged_pairs(folder / "now.parquet", now, first),
    }
    tables = GuardTables(holdout=holdout, diversity={}, pairs={})
    assert measure_change(Evidence(tables, 0)) == {}
    return measure_change(Evidence(tables, 2))


def test_a_judge_that_fades_is_told_by_mcnemars_test(tmp_path: Path) -> None:
    """Of 100 pairs iteration 0 had 80 right; now 12 of those are wrong and 2 others right."""
    then = [True] * 80 + [False] * 20
    now = [True] * 68 + [False] * 12 + [True] * 2 + [False] * 18
    found = change(tmp_path, then, now)
    assert found["accuracy_change"] == pytest.approx(-0.10)
    assert found["accuracy_change_high"] < 0
    p = 2 * sum(math.comb(14, k) for k in range(3)) / 2**14  # 2 of 14 or fewer, two-sided
    assert found["accuracy_change_p"] == pytest.approx(p)
    row = {"policy": "iter02", "reward_accuracy": 0.7} | found
    seed = {"policy": "iter00", "reward_accuracy": 0.8}
    sentence = change_sentence(row, seed, 0.0)
    assert sentence is not None
    assert "iter02 ranks 70 %" in sentence
    assert "-10.0 points" in sentence
    assert change_sentence(row, seed, 0.2) is None


def test_a_change_within_its_noise_is_no_finding(tmp_path: Path) -> None:
    then = [True] * 80 + [False] * 20
    now = [True] * 77 + [False] * 3 + [True] * 2 + [False] * 18
    found = change(tmp_path, then, now)
    assert found["accuracy_change"] == pytest.approx(-0.01)
    row = {"policy": "iter02", "reward_accuracy": 0.79} | found
    assert change_sentence(row, {"policy": "iter00", "reward_accuracy": 0.8}, 0.0) is None


def test_a_tie_counts_half_in_a_change(tmp_path: Path) -> None:
    found = change(tmp_path, [True] * 4, [True, None, None, False])
    assert found["accuracy_change"] == pytest.approx(-0.5)  # (0 - 1/2 - 1/2 - 1) / 4


def test_only_pairs_that_both_judged_are_compared(tmp_path: Path) -> None:
    found = change(tmp_path, [True] * 10, [False] * 10, first=5)
    assert found["accuracy_change"] == -1.0
    assert found["accuracy_change_p"] == pytest.approx(2 / 2**5)
    assert change(tmp_path, [True] * 10, [True] * 10, first=50) == {}


def test_a_pair_is_confident_above_nine_tenths() -> None:
    pairs = [{"probability": share} for share in (0.61, 0.89, 0.9, 0.91, 0.99)]
    assert measure_confidence(evidence(pairs=pairs)) == {"confident_share": 0.4}


def test_a_pair_whose_images_score_alike_is_half_better() -> None:
    pairs = [
        {"prompt_id": name, "winner_candidate": 0, "loser_candidate": 1}
        for name in ("a", "b", "c", "d")
    ]
    scores = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 1.0], "d": [1.0, 1.0]}
    found = evidence(pairs=pairs, candidate_scores=scores)
    found.tables = GuardTables(
        holdout={}, diversity={}, pairs={}, candidate_scores={1: [Path("x")]}
    )
    assert measure_best(found) == {"best_beats_worst": 0.5}
    listed = [{"prompt_id": name, "winner_candidate": winner, "loser_candidate": loser}
              for name in ("a", "b") for winner, loser in ((0, 3), (1, 2))]  # fmt: skip
    found.pairs = listed
    found.candidate_scores = {"a": [1.0, 0.2, 0.3, 0.0], "b": [0.0, 0.2, 0.3, 0.5]}
    assert measure_best(found) == {"best_beats_worst": 0.5}  # of four pairs one is better


def test_a_policy_that_is_its_reference_is_half_right_on_held_out_pairs(
    model: DiffusionModel, pairs: EncodedPairs
) -> None:
    held_out = HeldOut(pairs=pairs, num_draws=2, every_steps=1, seed=1)
    point = held_out.score(model, model.load_denoiser(), model.load_denoiser(), SETTINGS, step=0)
    assert (point.accuracy, point.logit) == (0.5, 0.0)


def test_what_is_told_of_held_out_pairs_is_of_their_own_winners_and_losers(
    model: DiffusionModel, other_denoiser: Denoiser, pairs: EncodedPairs
) -> None:
    exchanged = replace(pairs, winner=pairs.loser, loser=pairs.winner)
    held_out = HeldOut(pairs=exchanged, num_draws=3, every_steps=1, seed=1)
    reference = model.load_denoiser()
    errors = held_out.errors(model, other_denoiser, reference, SETTINGS)
    moved_w, moved_l = (
        (policy - frozen).numpy()
        for policy, frozen in (
            (errors.policy_w, errors.reference_w),
            (errors.policy_l, errors.reference_l),
        )
    )
    point = held_out.score(model, other_denoiser, reference, SETTINGS, step=0)
    assert abs(moved_w.mean() - moved_l.mean()) > 1e-5  # the case says something
    assert point.winner_error == pytest.approx(moved_w.mean(), abs=1e-6)
    assert point.loser_error == pytest.approx(moved_l.mean(), abs=1e-6)
    logits = -50 * (moved_w - moved_l)  # draw 0 of both pairs, then draw 1, then draw 2
    by_pair = np.array([logits[0::2].mean(), logits[1::2].mean()])
    assert point.logit == pytest.approx(logits.mean(), rel=1e-4)
    _, softening = softened_log_loss(by_pair.astype(np.float64))
    assert softening > 0
    expected = np.logaddexp(0, -softening * by_pair)
    np.testing.assert_allclose(point.pair_log_losses, expected, rtol=1e-4)
    assert point.log_loss == pytest.approx(expected.mean(), rel=1e-4)


def test_adafactor_moves_large_and_small_weights_by_the_learning_rate() -> None:
    weights = [torch.nn.Parameter(torch.full((3, 3), size)) for size in (100.0, 0.01)]
    optimizer = make_optimizer("adafactor", weights, learning_rate=1e-3, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight, size in zip(weights, (100.0, 0.01), strict=True):
        torch.testing.assert_close(weight.detach(), torch.full((3, 3), size - 1e-3))


@pytest.mark.parametrize("is_forced", [True, False])
def test_sdxls_guidance_moves_away_from_zeros_where_the_model_says_so(
    tmp_path: Path, is_forced: bool
) -> None:
    base = tiny_models.sdxl(tmp_path)
    index = base / "model_index.json"
    said = json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": is_forced}
    index.write_text(json.dumps(said))
    found = load_model(settings(base), device=CPU).unconditional()
    for name in ("text", "pooled"):
        assert bool(found[name].any()) is not is_forced
