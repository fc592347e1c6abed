"""KTO on single likes: its loss by hand, its equality with the loss of pairs, and its training."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.core.method.noising import Draws, generator, training_draws
from stages.core.method.objective import LikeErrors, like_loss, like_weights, mean_like_gain
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser, LoraSettings
from stages.core.models.loading import Source
from stages.core.models.stable_diffusion import StableDiffusion
from stages.core.policies.encoding import EncodedLikes, EncodedPairs
from stages.core.training.loop import Training
from stages.core.training.pair_losses import batch_loss, gain_of
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings
from tests.builders import CAPTIONS, FULL, LORA, settings
from tests.failing_model import Interrupted, failing

BETA = 5000.0
CPU = torch.device("cpu")
SETTINGS = TrainingSettings(
    loss="kto",
    dpo_beta=1000.0,
    learning_rate=1e-4,
    batch_pairs=3,
    passes=2.0,
    warmup_share=0.25,
    gradient_clip=1.0,
    weight_decay=0.01,
    caption_dropout=0.0,
)


SAVING = Execution(save_every=2)


class WatchedModel(StableDiffusion):
    """A model that keeps what it is asked to noise."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = getattr(self, "seen", [])
        self.seen.append((latents, noise, timesteps))
        return super().add_noise(latents, noise, timesteps)


@pytest.fixture(scope="module")
def likes(model: DiffusionModel) -> EncodedLikes:
    """Six images of random latents on three captions, of which four are liked."""
    return EncodedLikes(
        latents=torch.randn((6, *model.latents_shape), generator=generator(2)),
        is_liked=torch.tensor([True, True, False, True, False, True]),
        caption=torch.arange(6) % 3,
        text=model.encode_text([*CAPTIONS[:3], ""]),
        geometry=model.native_geometry(6),
    )


def train(
    model: DiffusionModel,
    likes: EncodedLikes,
    work: Path,
    lora: LoraSettings = FULL,
    execution: Execution = SAVING,
    **changes: Any,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    policy, reference = model.load_for_training(None, None, lora, seed=5)
    steps, _ = Training(
        model, policy, reference, likes, replace(SETTINGS, **changes),
        seed=3, work=work, identity="one", processes=Processes(CPU), execution=execution,
    ).run()  # fmt: skip
    return [asdict(replace(step, pairs_per_second=0.0)) for step in steps], policy.state_dict()


def test_the_loss_of_each_image_equals_the_published_formula_in_float64() -> None:
    rng = np.random.default_rng(5)
    policy, reference = (0.1 + 4e-4 * rng.standard_normal(7) for _ in range(2))
    is_liked = np.array([True, False, True, True, False, True, True])
    weight = np.where(is_liked, 1.12, 0.7)  # 0.8 of 5/7, 0.2 of 2/7
    errors = LikeErrors(
        policy=torch.from_numpy(policy), reference=torch.from_numpy(reference),
        is_liked=torch.from_numpy(is_liked), weight=torch.from_numpy(weight),
    )  # fmt: skip
    gain = reference - policy
    assert float(mean_like_gain(errors)) == pytest.approx((weight * gain).mean(), rel=1e-12)
    for base in (float((weight * gain).mean()), 3e-4, -3e-4):
        by_hand = []
        for one, sign, much in zip(gain, np.where(is_liked, 1, -1), weight, strict=True):
            utility = 1 / (1 + np.exp(-sign * BETA * (one - max(0.0, base))))
            by_hand.append(much * (1 - utility))
        assert like_loss(errors, BETA, base).tolist() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("liked_share", [0.5, 0.8])
def test_weights_make_each_kind_count_what_it_should_and_one_on_average(liked_share: float) -> None:
    is_liked = torch.arange(50) % 5 > 0
    found = like_weights(is_liked, liked_share, share_liked=0.8)
    assert float(found.mean()) == pytest.approx(1, rel=1e-6)
    assert float(found[is_liked].sum() / 50) == pytest.approx(liked_share, rel=1e-6)


@pytest.mark.parametrize("liked_share", [0.5, 0.8])
def test_likes_that_are_pairs_with_the_same_draws_have_the_loss_of_the_pairs(
    model: DiffusionModel, base_denoiser: Denoiser, other_denoiser: Denoiser, liked_share: float
) -> None:
    both = torch.randn((2, 3, *model.latents_shape), generator=generator(4))
    caption, text = torch.arange(3), model.encode_text([*CAPTIONS[:3], ""])
    pairs = EncodedPairs(
        winner=both[0], loser=both[1], caption=caption, text=text,
        winner_geometry=model.native_geometry(3), loser_geometry=model.native_geometry(3),
    )  # fmt: skip
    alone = EncodedLikes(
        latents=both.flatten(0, 1), is_liked=torch.arange(6) < 3, caption=caption.repeat(2),
        text=text, geometry=model.native_geometry(6),
    )  # fmt: skip
    draws = training_draws(8, num_pairs=3, num_timesteps=1000, latents_shape=model.latents_shape)
    twice = Draws(draws.timesteps.repeat(2), torch.cat([draws.noise] * 2))
    how = replace(SETTINGS, kto_liked_share=liked_share)
    rows, dropped = torch.arange(3), torch.tensor([False, True, False])
    asked = (model, other_denoiser, base_denoiser)
    of_pairs = gain_of(*asked, pairs, rows, draws, dropped, how)
    of_likes = gain_of(*asked, alone, torch.arange(6), twice, dropped.repeat(2), how)
    assert abs(float(of_pairs)) > 1e-6
    assert float(of_likes) == pytest.approx(float(of_pairs), rel=1e-3)
    for gain in (float(of_pairs), 2e-4):
        one = batch_loss(*asked, pairs, rows, draws, how, dropped, gain)
        other = batch_loss(*asked, alone, torch.arange(6), twice, how, dropped.repeat(2), gain)
        assert abs(float(one["loss"]) - 0.5) > 0.005  # the case says something
        for name in ("loss", "winner_error", "loser_error", "logit"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-3, abs=1e-6), name


def test_every_image_is_seen_once_a_pass_with_a_draw_of_its_own(
    tiny_base: str, likes: EncodedLikes, tmp_path: Path
) -> None:
    watched = WatchedModel(Source(settings(tiny_base)), device=CPU)
    train(watched, likes, tmp_path / "work", passes=1.0)
    assert len(watched.seen) == 4  # two steps, each asked for the mean gain first
    steps = watched.seen[1::2]
    for before, after in zip(watched.seen[::2], steps, strict=True):
        assert all(torch.equal(*two) for two in zip(before, after, strict=True))
    latents = torch.cat([step[0] for step in steps])
    places = [int((likes.latents == one).flatten(1).all(dim=1).nonzero()) for one in latents]
    assert sorted(places) == list(range(6))
    noise, timesteps = torch.cat([step[1] for step in steps]), torch.cat([s[2] for s in steps])
    assert len(torch.unique(noise.flatten(1), dim=0)) == 6
    assert len(set(timesteps.tolist())) > 4


@pytest.mark.slow
def test_parts_of_a_batch_have_the_loss_and_measures_of_the_whole(
    model: DiffusionModel, likes: EncodedLikes, tmp_path: Path
) -> None:
    found = [
        train(
            model, likes, tmp_path / str(size), batch_pairs=6, passes=4.0, kto_liked_share=0.8,
            execution=Execution(micro_batch_pairs=size),
        )[0]
        for size in (None, 1, 4)
    ]  # fmt: skip
    assert found[0][0]["loss"] == pytest.approx(0.5, abs=1e-6)
    for other in found[1:]:
        for step, expected in zip(other, found[0], strict=True):
            for name in ("loss", "logit", "winner_error", "loser_error"):
                assert step[name] == pytest.approx(expected[name], rel=0.02, abs=1e-3), name


def test_training_on_few_images_for_long_makes_it_like_the_liked_ones(
    model: DiffusionModel, likes: EncodedLikes, tmp_path: Path
) -> None:
    steps, _ = train(
        model, likes, tmp_path / "work", learning_rate=3e-4, passes=16.0, batch_pairs=6
    )
    last = steps[-4:]
    assert np.mean([step["loss"] for step in last]) < 0.45
    assert np.mean([step["logit"] for step in last]) > 0.05, last


@pytest.mark.quick("LoRA, adafactor, micro-batches")
@pytest.mark.parametrize(
    ("lora", "changed", "size"),
    [
        (FULL, {"ema_decay": 0.9, "caption_dropout": 0.5}, None),
        (LORA, {"optimizer": "adafactor"}, 1),
    ],
    ids=["full, average and dropout", "LoRA, adafactor, micro-batches"],
)
def test_a_training_on_likes_continues_bit_identically(
    tiny_base: str,
    likes: EncodedLikes,
    tmp_path: Path,
    lora: LoraSettings,
    changed: dict[str, Any],
    size: int | None,
) -> None:
    how = {"lora": lora, "execution": Execution(save_every=2, micro_batch_pairs=size), **changed}
    unbroken, expected = train(failing(tiny_base, -1), likes, tmp_path / "unbroken", **how)
    calls = 2 * (SETTINGS.batch_pairs if size == 1 else 1)  # each batch goes through twice
    with pytest.raises(Interrupted):
        train(failing(tiny_base, 3 * calls + 1), likes, tmp_path / "work", **how)
    resumed = failing(tiny_base, -1)
    steps, weights = train(resumed, likes, tmp_path / "work", **how)
    assert resumed.calls == 2 * calls  # of four steps two were saved
    assert steps == unbroken
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
