"""Pools of candidates, judges of unfinished latents, and the order in which transitions are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.core.errors import UserError
from stages.core.method.noising import DrawLaw, reward_draws
from stages.core.method.scoring import Difference, draw_errors
from stages.core.method.trajectories import Chains, chain_schedule, sample_trajectories
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model, use_arithmetic
from stages.core.policies.loading import RewardsBy, load_judge
from stages.core.training.online.batches import batches
from stages.core.training.online.judges import ImageJudge, SelfJudge, StepJudge, load_self_judge
from stages.core.training.online.loop import OnlineTraining
from stages.core.training.online.losses import Learner
from stages.core.training.online.rollouts import Prompt, Sampler
from stages.core.training.online.rounds import Asked
from stages.core.training.online.settings import JudgeSettings, OnlineSettings, check_settings
from stages.core.training.online.transitions import Rollout, joined
from stages.core.training.processes import Processes
from stages.core.training.settings import Execution
from stages.metrics import load_scorer
from tests import flow_models
from tests.builders import CAPTIONS, LORA
from tests.builders import settings as of_base

SETTINGS = OnlineSettings(
    method="spo",
    rounds=1,
    prompts_per_update=2,
    candidates_per_prompt=3,
    num_inference_steps=5,
    guidance_scale=3.0,
    learning_rate=1e-4,
    batch_transitions=4,
    ratio_clip=0.1,
    divert_step=2,
)


class Brightness(StepJudge):
    """A judge of clean latents by their mean, which keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[Tensor, int]] = []

    def __call__(
        self, clean: Tensor, prompts: Sequence[str], text: Conditioning, *, timestep: int,
        seeds: Sequence[int],
    ) -> np.ndarray:  # fmt: skip
        self.shown.append((clean.cpu(), timestep))
        assert len(prompts) == len(text) == len(seeds) == len(clean)
        return clean.mean(dim=(2, 3, 4)).double().cpu().numpy()


def sampler(
    model: DiffusionModel, denoiser: Denoiser, judge: Any, settings: OnlineSettings = SETTINGS
) -> Sampler:
    return Sampler(
        chains=Chains(
            model=model,
            denoiser=denoiser,
            schedule=chain_schedule(model, settings.num_inference_steps, settings.noise_level),
            unconditional=model.unconditional(),
            guidance_scale=settings.guidance_scale,
        ),
        judge=judge,
        settings=settings,
        text=model.encode_text(CAPTIONS[:3]),
        round=1,
    )


def asked(number: int = 2) -> list[Prompt]:
    return [
        Prompt(place=n, prompt_id=f"p{n}", prompt=CAPTIONS[n], caption=n, seed=40 + n)
        for n in range(number)
    ]


def test_a_pool_of_one_is_diffusers_chain(model: DiffusionModel, base_denoiser: Denoiser) -> None:
    """`sample_trajectories` equals diffusers' pipeline with eta = 1: tests/core/test_trajectories.py."""
    settings = replace(SETTINGS, candidates_per_prompt=1)
    judge = Brightness()
    one = sampler(model, base_denoiser, judge, settings)
    one.rollout(asked())
    expected = sample_trajectories(one.chains, one.text.rows(torch.arange(2)), [(40, 40), (41, 41)])
    finished, timestep = judge.shown[-1]
    assert timestep == 0
    torch.testing.assert_close(finished[:, 0], expected.latents[:, -1], rtol=1e-5, atol=1e-5)


def test_each_comparison_is_of_children_of_one_latent_by_the_estimates_of_the_next_step(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    judge = Brightness()
    spo = sampler(model, base_denoiser, judge)
    found = spo.rollout(asked())
    steps = spo.chains.schedule.timesteps.tolist()
    assert [timestep for _, timestep in judge.shown] == [steps[3], steps[4], 0]
    assert len(found.rows) == len(found.transitions) == 2 * 3  # two prompts, steps 2, 3 and 4
    assert [row["inference_step"] for row in found.rows] == [2, 3, 4, 2, 3, 4]
    for row, place in zip(found.rows, range(6), strict=True):
        item = found.transitions.rows(torch.tensor([place]))
        scores = row["scores"]
        assert row["winner_candidate"] == int(scores.argmax())
        assert row["loser_candidate"] == int(scores.argmin())
        assert torch.equal(item.before[0, 0], item.before[0, 1])  # one x_t
        assert not torch.allclose(item.after[0, 0], item.after[0, 1])
        number = row["inference_step"]
        clean = item.after  # of the last step: finished
        if number < 4:
            text = spo.text.rows(torch.tensor([row["place"]])).repeat(2)
            clean = spo.chains.step(item.after[0], torch.tensor([number + 1] * 2), text).clean[None]
        best, worst = clean[0].mean(dim=(1, 2, 3)).tolist()
        assert best == pytest.approx(float(scores.max()), abs=1e-4)
        assert worst == pytest.approx(float(scores.min()), abs=1e-4)


def test_the_candidate_that_goes_on_is_drawn_and_the_next_pool_are_its_children(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    rollouts = [
        sampler(model, base_denoiser, Brightness()).rollout([replace(asked(1)[0], seed=seed)])
        for seed in range(8)
    ]
    drawn = {row["next_candidate"] for found in rollouts for row in found.rows}
    assert drawn == {None, 0, 1, 2}  # None after the last step
    for found in rollouts:
        for earlier, later, row in zip(
            found.transitions.after, found.transitions.before[1:], found.rows, strict=False
        ):
            sides = {row["winner_candidate"]: earlier[0], row["loser_candidate"]: earlier[1]}
            if row["next_candidate"] in sides:
                assert torch.equal(sides[row["next_candidate"]], later[0])


def test_with_inner_steps_candidates_go_alone_and_each_of_their_steps_is_a_pair(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    judge = Brightness()
    found = sampler(model, base_denoiser, judge, replace(SETTINGS, inner_steps=2)).rollout(asked(1))
    assert [row["inference_step"] for row in found.rows] == [2, 3, 4]
    assert len(judge.shown) == 2
    first, second, _ = found.transitions.before
    assert torch.equal(first[0], first[1])
    assert not torch.allclose(second[0], second[1])
    assert torch.equal(second, found.transitions.after[0])
    assert np.array_equal(found.rows[0]["scores"], found.rows[1]["scores"])


def test_only_clear_comparisons_are_trained_on_and_all_are_told(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    everything = sampler(model, base_denoiser, Brightness()).rollout(asked())
    gaps = [np.tanh((row["scores"].max() - row["scores"].min()) / 2) for row in everything.rows]
    middle = float(np.median(gaps))
    settings = replace(SETTINGS, min_preference_gap=middle)
    some = sampler(model, base_denoiser, Brightness(), settings).rollout(asked())
    assert [row["is_valid"] for row in some.rows] == [gap > middle for gap in gaps]
    assert 0 < len(some.transitions) == sum(gap > middle for gap in gaps) < len(gaps)


@pytest.mark.parametrize("method", ["spo", "ddpo", "d3po"])
def test_what_a_prompt_gives_does_not_depend_on_what_is_sampled_with_it(
    model: DiffusionModel, base_denoiser: Denoiser, method: Any
) -> None:
    settings = replace(SETTINGS, method=method)
    together = sampler(model, base_denoiser, Brightness(), settings).rollout(asked())
    alone = joined(
        [sampler(model, base_denoiser, Brightness(), settings).rollout([p]) for p in asked()]
    )
    for name in ("caption", "number", "chain"):
        assert torch.equal(getattr(together.transitions, name), getattr(alone.transitions, name))
    torch.testing.assert_close(
        together.transitions.after, alone.transitions.after, rtol=0, atol=1e-4
    )
    assert [row["winner_candidate"] for row in together.rows] == [
        row["winner_candidate"] for row in alone.rows
    ]


def test_d3po_pairs_the_best_and_the_worst_of_chains_from_one_noise(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    judge = Brightness()
    found = sampler(model, base_denoiser, judge, replace(SETTINGS, method="d3po")).rollout(asked(1))
    assert len(found.transitions) == 5
    finished, timestep = judge.shown[0]
    assert timestep == 0
    row = found.rows[0]
    assert torch.equal(found.transitions.before[0, 0], found.transitions.before[0, 1])
    for side, name in enumerate(("winner_candidate", "loser_candidate")):
        assert torch.equal(found.transitions.after[-1, side], finished[0, row[name]])
        assert torch.equal(found.transitions.after[:-1, side], found.transitions.before[1:, side])


def ddpo(model: DiffusionModel, denoiser: Denoiser) -> tuple[Sampler, Rollout]:
    one = sampler(model, denoiser, Brightness(), replace(SETTINGS, method="ddpo"))
    return one, one.rollout(asked())


def test_ddpo_keeps_every_step_of_every_image(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    _, found = ddpo(model, base_denoiser)
    assert len(found.transitions) == len(found.rows) == 2 * 3 * 5
    assert found.transitions.number.tolist() == [0, 1, 2, 3, 4] * 6
    assert found.transitions.chain.tolist() == [chain for chain in range(6) for _ in range(5)]
    finished = found.transitions.after[4::5, 0].mean(dim=(1, 2, 3))
    assert [row["scores"].tolist() for row in found.rows[::5]] == [[s] for s in finished.tolist()]


def learner(one: Sampler, policy: Denoiser, reference: Denoiser) -> Learner:
    return Learner(
        policy=one.chains.of(policy), reference=one.chains.of(reference),
        settings=one.settings, text=one.text,
    )  # fmt: skip


def test_ddpos_ratio_is_1_before_anything_was_trained_and_its_loss_minus_the_mean_advantage(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    one, found = ddpo(model, base_denoiser)
    items = replace(found.transitions, advantage=torch.linspace(-2, 2, 30))
    losses = learner(one, base_denoiser, base_denoiser).losses(items)
    assert float(losses["clipped_share"]) == 0.0
    torch.testing.assert_close(losses["loss"].detach(), -items.advantage, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["spo", "d3po"])
def test_the_loss_of_pairs_is_ln_2_at_the_reference_and_by_hand_elsewhere(
    model: DiffusionModel, base_denoiser: Denoiser, other_denoiser: Denoiser, method: Any
) -> None:
    one = sampler(model, base_denoiser, Brightness(), replace(SETTINGS, method=method))
    pairs = one.rollout(asked()).transitions
    same = learner(one, base_denoiser, base_denoiser).losses(pairs)
    assert same["loss"].tolist() == pytest.approx([np.log(2)] * len(pairs), abs=1e-6)
    with torch.no_grad():
        found = learner(one, other_denoiser, base_denoiser).losses(pairs)
    for place in range(len(pairs)):
        item = pairs.rows(torch.tensor([place]))
        logs = []
        for side in range(2):
            densities = []
            for denoiser in (other_denoiser, base_denoiser):
                text = one.text.rows(item.caption)
                step = one.chains.of(denoiser).step(item.before[:, side], item.number, text)
                normal = torch.distributions.Normal(step.mean.double(), step.sigma.double())
                densities.append(normal.log_prob(item.after[:, side].double()).mean())
            ratio = (densities[0] - densities[1]).exp().clamp(0.9, 1.1)
            logs.append(float(ratio.log()))
        expected = np.log1p(np.exp(-10 * (logs[0] - logs[1])))
        assert float(found["loss"][place]) == pytest.approx(expected, abs=2e-4)


def test_the_self_judge_is_the_implicit_reward_on_shared_draws_in_log_odds(
    model: DiffusionModel, base_denoiser: Denoiser, other_denoiser: Denoiser
) -> None:
    both = Difference(other_denoiser, base_denoiser)
    judge = SelfJudge(model=model, judge=both, num_draws=3, log_odds=2500.0)
    clean = torch.randn((2, 3, *model.latents_shape), generator=torch.Generator().manual_seed(1))
    text = model.encode_text(CAPTIONS[:2])
    found = judge(clean, CAPTIONS[:2], text, timestep=500, seeds=[7, 8])
    for place, seed in enumerate((7, 8)):
        draws = reward_draws(
            seed, num_draws=3, num_timesteps=1000, latents_shape=model.latents_shape
        )
        one = text.rows(torch.tensor([place]))
        errors = draw_errors(model, both, clean[place], one, draws)
        gain = (errors.reference - errors.policy).double().mean(dim=1)
        assert found[place].tolist() == pytest.approx((2500 * gain).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "rewards_by", "law"), [("float32", "difference", "uniform"), ("float16", "secant", "logit_normal")]
)  # fmt: skip
def test_the_self_judge_of_a_model_in_half_precision_judges_as_candidates_are_scored(
    tiny_base: str, other_policy: Path, dtype: Any, rewards_by: RewardsBy, law: DrawLaw
) -> None:
    trained = load_model(of_base(tiny_base, "bfloat16"), device=torch.device("cpu"))
    settings = JudgeSettings(
        name="self", policy=str(other_policy), num_draws=3, dtype=dtype, rewards_by=rewards_by, draw_law=law
    )  # fmt: skip
    judge = load_self_judge(trained, settings, SETTINGS)
    clean = torch.randn((1, 3, *trained.latents_shape), generator=torch.Generator().manual_seed(1))
    text = trained.encode_text(CAPTIONS[:1])
    found = judge(clean, CAPTIONS[:1], text, timestep=500, seeds=[7])

    scoring = load_model(of_base(tiny_base, dtype), device=torch.device("cpu"))
    draws = reward_draws(
        7, num_draws=3, num_timesteps=1000, latents_shape=scoring.latents_shape, law=law
    )
    told = Conditioning({"text": text["text"].to(scoring.dtype)})
    by = load_judge(scoring, str(other_policy), "base", rewards_by)
    errors = draw_errors(scoring, by, clean[0], told, draws)
    gain = (errors.reference - errors.policy).double().mean(dim=1)
    assert found[0].tolist() == pytest.approx((SETTINGS.dpo_beta / 2 * gain).tolist(), rel=1e-5)
    assert not torch.backends.cudnn.allow_tf32


def test_the_self_judge_shares_a_model_of_its_precision_and_leaves_its_arithmetic(
    model: DiffusionModel, tiny_base: str, other_policy: Path
) -> None:
    plain = JudgeSettings(name="self", policy=str(other_policy))
    assert load_self_judge(model, plain, SETTINGS).model is model
    trained = load_model(of_base(tiny_base, "tf32"), device=torch.device("cpu"))
    judge = load_self_judge(trained, replace(plain, dtype="float32"), SETTINGS)
    assert (judge.model.source.settings.dtype, trained.source.settings.dtype) == ("float32", "tf32")
    assert torch.backends.cudnn.allow_tf32  # the training goes on as it was
    use_arithmetic(model.source.settings)


def test_a_metric_judges_the_decoded_estimates_in_their_order(model: DiffusionModel) -> None:
    judge = ImageJudge(model=model, score=load_scorer("colourfulness"), scale=0.5)
    clean = torch.randn((2, 3, *model.latents_shape), generator=torch.Generator().manual_seed(1))
    text = model.encode_text(CAPTIONS[:2])
    found = judge(clean, CAPTIONS[:2], text, timestep=500, seeds=[7, 8])
    images = (model.decode_latents(clean[1, 2:]).numpy() * 255).round().astype(np.uint8)
    alone = load_scorer("colourfulness")(images=images.transpose(0, 2, 3, 1), prompts=[CAPTIONS[1]])
    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(0.5 * float(alone[0]), rel=1e-3)


def test_a_judge_that_gives_no_number_is_named_with_round_prompt_and_timestep(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    class Lost(Brightness):
        def __call__(self, clean: Tensor, *words: Any, **more: Any) -> np.ndarray:
            return np.full(clean.shape[:2], np.nan)

    with pytest.raises(UserError, match=rf"round 1: the judge gave \[nan.*{CAPTIONS[0]}"):
        sampler(model, base_denoiser, Lost()).rollout(asked())


def test_every_item_is_trained_on_once_and_ddpos_batches_are_of_whole_images(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    one, found = ddpo(model, base_denoiser)
    settings = replace(one.settings, batch_transitions=10)
    parts = list(batches(found.transitions, settings, 3))
    assert [len(part) for part in parts] == [10, 10, 10]
    assert sorted(torch.cat(parts).tolist()) == list(range(30))
    for part in parts:
        assert sorted(found.transitions.number[part].tolist()) == sorted([0, 1, 2, 3, 4] * 2)
    assert found.transitions.number[parts[0]].tolist() != [0, 1, 2, 3, 4] * 2  # shuffled
    twice = list(batches(found.transitions, replace(settings, passes=2), 3))
    assert len(twice) == 6
    assert not torch.equal(twice[0], twice[3])
    pairs = sampler(model, base_denoiser, Brightness()).rollout(asked()).transitions
    parts = list(batches(pairs, SETTINGS, 3))
    assert [len(part) for part in parts] == [4, 2]
    assert sorted(torch.cat(parts).tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("changed", "judge", "message"),
    [
        ({"candidates_per_prompt": 1}, {}, "candidates_per_prompt is 1, but spo compares"),
        ({"method": "d3po", "candidates_per_prompt": 1}, {}, "but d3po compares candidates"),
        ({"divert_step": 5}, {}, "divert_step is 5, but the steps are 0 to 4"),
        ({"method": "ddpo", "batch_transitions": 7}, {}, "no multiple of num_inference_steps = 5"),
        ({}, {"name": "self"}, "judges by the policy 'base', whose implicit reward is 0"),
        ({"rounds": 0}, {}, "rounds is 0; it must be at least 1"),
        ({"ratio_clip": 1.0}, {}, "ratio_clip is 1.0; it must be between 0 and 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    changed: dict[str, Any], judge: dict[str, Any], message: str
) -> None:
    check_settings(SETTINGS, JudgeSettings(name="total"))
    with pytest.raises(UserError, match=message):
        check_settings(replace(SETTINGS, **changed), JudgeSettings(**{"name": "total", **judge}))


def test_gaussian_steps_of_the_pool_are_those_of_the_schedule(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    """What comes of a step lies as far from its mean as its noise is large."""
    spo = sampler(model, base_denoiser, Brightness())
    found = spo.rollout(asked()).transitions
    for side in range(2):
        step = spo.chains.step(found.before[:, side], found.number, spo.text.rows(found.caption))
        apart = (found.after[:, side] - step.mean) / step.sigma.reshape(-1, 1, 1, 1)
        assert apart.std().item() == pytest.approx(1.0, abs=0.1)
        again = spo.chains.schedule.step(
            found.number, torch.zeros_like(step.mean), found.before[:, side]
        )
        assert torch.equal(again.sigma, step.sigma)


class Second(Processes):
    """A process that is not the one that writes."""

    is_main = property(lambda self: False)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Processes, Second])
def test_every_process_knows_when_the_next_state_is_due(
    model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Processes]
) -> None:
    settings = replace(
        SETTINGS, method="ddpo", rounds=5, prompts_per_update=1, candidates_per_prompt=2,
        num_inference_steps=2, guidance_scale=1.0, batch_transitions=4, prompt_buffer=0,
    )  # fmt: skip
    asked = Asked(
        prompts=[("p", CAPTIONS[0])], text=model.encode_text(CAPTIONS[:1]),
        unconditional=model.unconditional(),
    )  # fmt: skip
    policy, reference = model.load_for_training(None, None, LORA, seed=0)
    training = OnlineTraining(
        model, policy, reference, Brightness(), asked, settings,
        seed=1, work=tmp_path, identity="one", processes=kind(torch.device("cpu")),
        execution=Execution(save_every=2), prompts_per_batch=1,
    )  # fmt: skip
    saved, save = [], training._save
    monkeypatch.setattr(training, "_save", lambda: (saved.append(len(training.steps)), save()))
    training.run()
    assert saved == [2, 4]  # one step a round


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDIM", pytest.param("flow", marks=pytest.mark.long)])
def test_ddpo_raises_a_reward_that_is_easy_to_raise(
    model: DiffusionModel, tmp_path: Path, kind: str
) -> None:
    """The mean of the finished latents, by 12 updates of 32 images each."""
    if kind == "flow":
        model = load_model(of_base(flow_models.sd3(tmp_path / "sd3")), device=model.device)
    settings = replace(
        SETTINGS, method="ddpo", rounds=12, prompts_per_update=1, candidates_per_prompt=32,
        num_inference_steps=4, guidance_scale=1.0, batch_transitions=128, ratio_clip=1e-4,
        prompt_buffer=0,
    )  # fmt: skip
    asked = Asked(
        prompts=[("p", CAPTIONS[0])], text=model.encode_text(CAPTIONS[:1]),
        unconditional=model.unconditional(),
    )  # fmt: skip
    steps, _ = OnlineTraining(
        model, model.load_denoiser(), model.load_denoiser(), Brightness(), asked, settings,
        seed=1, work=tmp_path / "work", identity="one", processes=Processes(torch.device("cpu")),
        execution=Execution(save_every=100), prompts_per_batch=1,
    ).run()  # fmt: skip
    scores = [step.mean_score for step in steps]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.02
