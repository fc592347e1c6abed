"""The training loop: its loss by hand, its schedule, its order, and that it survives interruptions."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.core.errors import UserError
from stages.core.execution.stopping import STOP, Stopped
from stages.core.method.noising import generator, training_draws
from stages.core.method.objective import PairErrors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser, LoraSettings
from stages.core.models.loading import Source
from stages.core.models.stable_diffusion import StableDiffusion
from stages.core.policies.encoding import EncodedPairs
from stages.core.training import loop, processes
from stages.core.training.attention import without_cudnn_attention
from stages.core.training.loop import Step, Training, TrainingError
from stages.core.training.pair_losses import batch_loss, pair_losses
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution, TrainingSettings, num_steps
from tests.builders import CAPTIONS, FULL, LORA, settings
from tests.failing_model import Interrupted, failing

SETTINGS = TrainingSettings(
    dpo_beta=100.0,
    learning_rate=1e-4,
    batch_pairs=2,
    passes=2.0,
    warmup_share=0.25,
    gradient_clip=1.0,
    weight_decay=0.01,
    caption_dropout=0.0,
)
NUM_PAIRS = 6
CPU = torch.device("cpu")


class WatchedModel(StableDiffusion):
    """A model that keeps what it is asked to noise."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = getattr(self, "seen", [])
        self.seen.append((latents, noise, timesteps))
        return super().add_noise(latents, noise, timesteps)


class AskedModel(StableDiffusion):
    """A model during whose `stop_at`-th batch SIGTERM comes."""

    stop_at = 0
    calls = 0

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            STOP.ask()
        return super().add_noise(latents, noise, timesteps)


@pytest.fixture(scope="module")
def pairs(model: DiffusionModel) -> EncodedPairs:
    """Six pairs of random latents on three captions."""
    both = torch.randn((2, NUM_PAIRS, *model.latents_shape), generator=generator(2))
    return EncodedPairs(
        winner=both[0],
        loser=both[1],
        caption=torch.arange(NUM_PAIRS) % 3,
        text=model.encode_text([*CAPTIONS[:3], ""]),
        winner_geometry=model.native_geometry(NUM_PAIRS),
        loser_geometry=model.native_geometry(NUM_PAIRS),
    )


def train(
    model: DiffusionModel,
    pairs: EncodedPairs,
    work: Path,
    *,
    settings: TrainingSettings = SETTINGS,
    policy: Denoiser | None = None,
    reference: Denoiser | None = None,
    identity: str = "one",
    save_every: int | None = 2,
    save_minutes: float = 10.0,
) -> tuple[list[Step], dict[str, Tensor]]:
    policy = policy or model.load_denoiser()
    steps, _ = Training(
        model,
        policy,
        reference or model.load_denoiser(),
        pairs,
        settings,
        seed=3,
        work=work,
        identity=identity,
        processes=Processes(CPU),
        execution=Execution(save_every=save_every, save_minutes=save_minutes),
    ).run()
    return steps, policy.state_dict()


def without_speed(steps: list[Step]) -> list[dict[str, float]]:
    return [asdict(replace(step, pairs_per_second=0.0)) for step in steps]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_batch_loss_equals_the_equation_on_the_networks_predictions_in_float64(
    model: DiffusionModel, base_denoiser: Denoiser, other_denoiser: Denoiser, pairs: EncodedPairs
) -> None:
    rows = torch.tensor([4, 1, 3])
    draws = training_draws(8, num_pairs=3, num_timesteps=1000, latents_shape=model.latents_shape)
    found = batch_loss(
        model, other_denoiser, base_denoiser, pairs, rows, draws, SETTINGS, torch.zeros(3).bool()
    )
    alphas = model.sampler("ddpm").alphas_cumprod.double()[draws.timesteps][:, None, None, None]

    def errors(unet: Denoiser, latents: Tensor) -> np.ndarray:
        noised = alphas.sqrt() * latents[rows].double() + (1 - alphas).sqrt() * draws.noise.double()
        text = pairs.text["text"][pairs.caption[rows]]
        with torch.no_grad():
            out = unet(noised.float(), draws.timesteps, encoder_hidden_states=text).sample
        return ((out.double() - draws.noise.double()) ** 2).mean(dim=(1, 2, 3)).numpy()

    gain_w = errors(other_denoiser, pairs.winner) - errors(base_denoiser, pairs.winner)
    gain_l = errors(other_denoiser, pairs.loser) - errors(base_denoiser, pairs.loser)
    logit = -SETTINGS.dpo_beta / 2 * (gain_w - gain_l)
    loss = np.log1p(np.exp(-logit)).mean()
    assert abs(loss - math.log(2)) > 0.01  # the case says something
    assert found["loss"].item() == pytest.approx(loss, abs=1e-5)
    assert found["logit"].item() == pytest.approx(logit.mean(), abs=1e-4)
    assert found["winner_error"].item() == pytest.approx(gain_w.mean(), abs=1e-6)
    assert found["loser_error"].item() == pytest.approx(gain_l.mean(), abs=1e-6)
    assert found["implicit_accuracy"].item() == pytest.approx((logit > 0).mean(), abs=1e-6)


def test_first_step_from_the_reference_has_loss_ln_2_and_moves_only_the_policy(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    policy, reference = model.load_denoiser(), model.load_denoiser()
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    steps, weights = train(model, pairs, tmp_path / "work", policy=policy, reference=reference)
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-7)
    assert steps[0].implicit_accuracy == 0  # no pair is ranked yet
    assert (steps[0].logit, steps[0].winner_error, steps[0].loser_error) == (0, 0, 0)
    assert steps[-1].loss != steps[0].loss
    assert same(before, reference.state_dict())
    assert not same(before, weights)
    assert not policy.network.training


def test_ktos_liked_share_reaches_the_loss(model: DiffusionModel, pairs: EncodedPairs) -> None:
    errors = PairErrors(*(torch.tensor([value]) for value in (0.1, 0.1, 0.101, 0.102)))
    settings = replace(SETTINGS, loss="kto", kto_liked_share=0.8, dpo_beta=1000.0)
    found = pair_losses(errors, model, pairs, torch.tensor([0]), settings, 0.0)
    liked, disliked = (1 / (1 + math.exp(-logit)) for logit in (1.0, -2.0))
    assert float(found) == pytest.approx(1 - 0.8 * liked - 0.2 * disliked, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("liked_share", [0.5, 0.8])
def test_ktos_mean_gain_is_of_the_whole_batch_whatever_goes_through_the_network_at_once(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path, liked_share: float
) -> None:
    settings = replace(
        SETTINGS,
        loss="kto",
        kto_liked_share=liked_share,
        batch_pairs=6,
        passes=6.0,
        dpo_beta=1000.0,
    )
    found = []
    for size in (None, 1, 4):
        steps, _ = Training(
            model, model.load_denoiser(), model.load_denoiser(), pairs, settings,
            seed=3, work=tmp_path / str(size), identity="one", processes=Processes(CPU),
            execution=Execution(micro_batch_pairs=size),
        ).run()  # fmt: skip
        found.append([step.loss for step in steps])
    assert found[0][0] == pytest.approx(0.5, abs=1e-6)
    if liked_share == 0.5:  # else the disliked ones' gains count little, and noise more
        assert found[0][-1] < 0.5 - 1e-3, found
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-3)


def test_training_on_few_pairs_for_long_makes_it_prefer_the_winners(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, learning_rate=3e-4, passes=12.0, batch_pairs=6, dpo_beta=1000.0)
    steps, _ = train(model, pairs, tmp_path / "work", settings=settings)
    assert np.mean([step.loss for step in steps[-4:]]) < 0.8 * math.log(2)
    assert np.mean([step.implicit_accuracy for step in steps[-4:]]) > 0.7


def test_the_first_steps_size_is_adamws_and_its_gradient_the_losses(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, passes=1 / 3, warmup_share=0.0, weight_decay=0.0)
    before = model.load_denoiser().state_dict()
    steps, after = train(model, pairs, tmp_path / "work", settings=settings)
    assert len(steps) == 1
    assert steps[0].gradient_norm > 0
    largest = max((after[name] - before[name]).abs().max().item() for name in before)
    # AdamW's first step is the learning rate in the gradient's direction
    assert largest == pytest.approx(settings.learning_rate, rel=0.01)


@pytest.mark.parametrize(
    ("passes", "batch_pairs", "expected"),
    [(1.0, 2, 3), (2.0, 2, 6), (1.0, 4, 2), (0.1, 6, 1), (10.0, 6, 10), (0.5, 1, 3)],
)
def test_number_of_steps_is_passes_over_the_pairs_rounded_up(
    passes: float, batch_pairs: int, expected: int
) -> None:
    assert num_steps(6, replace(SETTINGS, passes=passes, batch_pairs=batch_pairs)) == expected


@pytest.mark.quick("0.25-factors1")
@pytest.mark.parametrize(
    ("share", "factors"),
    [
        (0.0, [1, 1, 1, 1, 1, 1]),
        (0.25, [1 / 2, 1, 1, 1, 1, 1]),  # a quarter of 6 steps, rounded up, is 2
        (0.5, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        (1.0, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
    ],
)
def test_learning_rate_rises_in_the_warmup_and_then_stays(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path, share: float, factors: list[float]
) -> None:
    settings = replace(SETTINGS, warmup_share=share)
    steps, _ = train(model, pairs, tmp_path / "work", settings=settings)
    expected = [1e-4 * factor for factor in factors]
    assert [step.learning_rate for step in steps] == pytest.approx(expected)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]


def test_every_pair_is_seen_once_a_pass_with_one_noise_for_winner_and_loser(
    tiny_base: str, pairs: EncodedPairs, tmp_path: Path
) -> None:
    model = WatchedModel(Source(settings(tiny_base)), device=CPU)
    train(model, pairs, tmp_path / "work")
    passes: list[list[int]] = [[], []]
    for step, (latents, noise, timesteps) in enumerate(model.seen):
        assert torch.equal(noise[:2], noise[2:])
        assert torch.equal(timesteps[:2], timesteps[2:])
        for winner, loser in zip(latents[:2], latents[2:], strict=True):
            number = int((pairs.winner == winner).all(dim=(1, 2, 3)).nonzero())
            assert torch.equal(loser, pairs.loser[number])
            passes[step // 3].append(number)
    assert [Counter(numbers) for numbers in passes] == [Counter(range(NUM_PAIRS))] * 2
    assert passes[0] != passes[1]
    noises = torch.stack([noise[0] for _, noise, _ in model.seen])
    assert len(torch.unique(noises, dim=0)) == 6


@pytest.mark.parametrize("is_dropped", [True, False])
def test_a_dropped_caption_trains_on_the_empty_one(
    model: DiffusionModel,
    base_denoiser: Denoiser,
    other_denoiser: Denoiser,
    pairs: EncodedPairs,
    is_dropped: bool,
) -> None:
    rows = torch.tensor([0, 1])
    draws = training_draws(8, num_pairs=2, num_timesteps=1000, latents_shape=model.latents_shape)
    empty = replace(pairs, caption=torch.full((NUM_PAIRS,), 3))
    losses = [
        batch_loss(
            model,
            other_denoiser,
            base_denoiser,
            which,
            rows,
            draws,
            SETTINGS,
            torch.tensor([dropped, dropped]),
        )["loss"].item()
        for which, dropped in ((pairs, is_dropped), (empty, False))
    ]
    assert (losses[0] == losses[1]) is is_dropped


def test_caption_dropout_changes_a_training_and_its_share_is_kept(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    plain, _ = train(model, pairs, tmp_path / "a")
    all_dropped, _ = train(
        model, pairs, tmp_path / "b", settings=replace(SETTINGS, caption_dropout=1.0)
    )
    empty, _ = train(model, replace(pairs, caption=torch.full((NUM_PAIRS,), 3)), tmp_path / "c")
    assert without_speed(all_dropped) == without_speed(empty)
    assert without_speed(plain) != without_speed(empty)


def test_two_trainings_with_the_same_seed_end_with_the_same_weights(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    first, weights = train(model, pairs, tmp_path / "a")
    second, others = train(model, pairs, tmp_path / "b", save_every=100)
    assert without_speed(first) == without_speed(second)
    assert same(weights, others)
    assert not (tmp_path / "b").exists()  # nothing to save before the end


@pytest.mark.quick("4-2")
@pytest.mark.parametrize(("stop_at", "saved"), [(6, 4), (4, 2), (2, 0)])
def test_an_interrupted_training_continues_and_ends_bit_identical_to_an_unbroken_one(
    tiny_base: str,
    model: DiffusionModel,
    pairs: EncodedPairs,
    tmp_path: Path,
    stop_at: int,
    saved: int,
) -> None:
    unbroken, expected = train(model, pairs, tmp_path / "unbroken")
    work = tmp_path / "work"
    with pytest.raises(Interrupted):
        train(failing(tiny_base, stop_at), pairs, work)
    assert sorted(path.name for path in work.glob("*")) == (
        [f"step-{saved:06d}.pt", "state.json"][::-1] if saved else []
    )
    resumed = failing(tiny_base, -1)
    steps, weights = train(resumed, pairs, work)
    assert resumed.calls == 6 - saved
    assert without_speed(steps) == without_speed(unbroken)
    assert same(weights, expected)


@pytest.mark.quick("4-3")
@pytest.mark.parametrize(("minutes", "saved"), [(1, 0), (4, 3), (5, 4), (20, 5)])
def test_a_state_is_saved_at_the_first_step_after_ten_minutes_and_continued_to_the_same_weights(
    tiny_base: str,
    model: DiffusionModel,
    pairs: EncodedPairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: int,
    saved: int,
) -> None:
    """By a clock on which a step takes so many minutes; the sixth step is interrupted."""
    unbroken, expected = train(model, pairs, tmp_path / "unbroken", save_every=None)
    assert not (tmp_path / "unbroken").exists()
    slow, work = failing(tiny_base, 6), tmp_path / "work"
    with monkeypatch.context() as patch:
        clock = SimpleNamespace(monotonic=lambda: 60.0 * minutes * slow.calls)
        patch.setattr(loop, "time", clock)
        with pytest.raises(Interrupted):
            train(slow, pairs, work, save_every=None)
    assert sorted(path.name for path in work.glob("*")) == (
        ["state.json", f"step-{saved:06d}.pt"] if saved else []
    )
    resumed = failing(tiny_base, -1)
    steps, weights = train(resumed, pairs, work, save_every=None)
    assert resumed.calls == 6 - saved
    assert without_speed(steps) == without_speed(unbroken)
    assert same(weights, expected)


@pytest.mark.quick("5-2")
@pytest.mark.parametrize(("stop_at", "saved"), [(1, 0), (5, 2), (6, 3)])
def test_a_training_that_is_asked_to_stop_saves_its_last_whole_step_and_continues_from_it(
    tiny_base: str,
    pairs: EncodedPairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
    saved: int,
) -> None:
    """Two micro-batches a step: SIGTERM in the fifth leaves out the sixth, and the third step."""

    def run(work: Path, stop_at: int) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        model = AskedModel(Source(settings(tiny_base)), device=CPU)
        model.stop_at = stop_at
        policy, reference = model.load_denoiser(), model.load_denoiser()
        steps, _ = Training(
            model,
            policy,
            reference,
            pairs,
            SETTINGS,
            seed=3,
            work=work,
            identity="one",
            processes=Processes(CPU),
            execution=Execution(save_every=100, micro_batch_pairs=1),
        ).run()
        return without_speed(steps), policy.state_dict()

    unbroken, expected = run(tmp_path / "unbroken", -1)
    work = tmp_path / "work"
    with monkeypatch.context() as patch, STOP.deferred():
        patch.setattr(STOP, "is_asked", False)
        with pytest.raises(Stopped, match=f"the training's state of step {saved} is saved in"):
            run(work, stop_at)
    assert sorted(path.name for path in work.iterdir()) == ["state.json", f"step-{saved:06d}.pt"]
    steps, weights = run(work, -1)
    assert steps == unbroken
    assert same(weights, expected)


@pytest.mark.quick("average and dropout", "LoRA")
@pytest.mark.parametrize(
    ("lora", "changed", "micro_batch_pairs"),
    [
        (FULL, {"optimizer": "adafactor"}, None),
        (FULL, {"ema_decay": 0.9, "caption_dropout": 0.5}, None),
        (LORA, {}, None),
        (LORA, {"optimizer": "adafactor", "ema_decay": 0.5}, 1),
    ],
    ids=["adafactor", "average and dropout", "LoRA", "LoRA, adafactor, average, micro-batches"],
)
def test_every_kind_of_training_continues_bit_identically(
    tiny_base: str,
    pairs: EncodedPairs,
    tmp_path: Path,
    lora: LoraSettings,
    changed: dict[str, Any],
    micro_batch_pairs: int | None,
) -> None:
    settings = replace(SETTINGS, learning_rate=1e-3, **changed)
    execution = Execution(save_every=2, micro_batch_pairs=micro_batch_pairs)

    def run(stop_at: int, work: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        model = failing(tiny_base, stop_at)
        policy, reference = model.load_for_training(None, None, lora, seed=5)
        steps, _ = Training(
            model,
            policy,
            reference,
            pairs,
            settings,
            seed=3,
            work=work,
            identity="one",
            processes=Processes(CPU),
            execution=execution,
        ).run()
        return without_speed(steps), policy.state_dict()

    unbroken, expected = run(-1, tmp_path / "unbroken")
    calls = SETTINGS.batch_pairs if micro_batch_pairs == 1 else 1
    with pytest.raises(Interrupted):
        run(5 * calls, tmp_path / "work")
    steps, weights = run(-1, tmp_path / "work")
    assert steps == unbroken
    assert same(weights, expected)
    assert any(weight.abs().max() > 0 for weight in weights.values())


def test_a_state_of_another_identity_is_not_used(
    tiny_base: str, model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    with pytest.raises(Interrupted):
        train(failing(tiny_base, 6), pairs, work, settings=replace(SETTINGS, learning_rate=1e-3))
    afresh = failing(tiny_base, -1)
    steps, weights = train(afresh, pairs, work, identity="two")
    unbroken, expected = train(model, pairs, tmp_path / "unbroken", identity="two")
    assert afresh.calls == 6
    assert without_speed(steps) == without_speed(unbroken)
    assert same(weights, expected)


@pytest.mark.parametrize(("device", "stays"), [("cpu", True), ("cuda", False)])
def test_a_training_on_a_gpu_leaves_out_cudnns_attention(
    monkeypatch: pytest.MonkeyPatch, device: str, stays: bool
) -> None:
    monkeypatch.setattr(processes, "Accelerator", lambda **_: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        Processes(torch.device(device))
        assert torch.backends.cuda.cudnn_sdp_enabled() == stays
        torch.backends.cuda.enable_cudnn_sdp(True)
        with without_cudnn_attention():  # as preflight tries a step
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class OneOfTwo(Processes):
    """The second of two processes, without the first."""

    count, rank = 2, 1  # type: ignore[assignment]


def test_a_batch_is_shared_in_equal_parts_or_refused() -> None:
    second = OneOfTwo(CPU)
    assert second.share(6) == slice(3, 6)
    with pytest.raises(UserError, match="batch_pairs is 3, which 2 processes cannot share equally"):
        second.share(3)


def test_a_loss_that_is_not_finite_stops_and_names_step_loss_and_what_is_kept(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    settings = replace(SETTINGS, learning_rate=1e30, warmup_share=0.0)
    with pytest.raises(TrainingError, match=r"stopped at step 2: loss nan") as caught:
        train(model, pairs, work, settings=settings, save_every=1)
    assert f"the state of step 1 is kept in {work}" in str(caught.value)
    assert (work / "state.json").is_file()


def test_a_first_loss_that_is_not_finite_says_that_nothing_was_saved(
    model: DiffusionModel, pairs: EncodedPairs, tmp_path: Path
) -> None:
    broken = replace(pairs, winner=torch.full_like(pairs.winner, torch.nan))
    with pytest.raises(TrainingError, match=r"step 1: loss nan.*no state had been saved yet"):
        train(model, broken, tmp_path / "work", save_every=1)
    assert not (tmp_path / "work").exists()
