"""Sampling with a judge beside it: pools of candidates (SPO) and whole chains (DDPO, D3PO)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from stages.core.errors import UserError
from stages.core.method.noising import generator
from stages.core.method.online_objective import is_clear
from stages.core.method.seeding import seed_of
from stages.core.method.selection import best_worst
from stages.core.method.trajectories import Chains, first_noise, sample_trajectories
from stages.core.models.conditioning import Conditioning
from stages.core.training.online.judges import StepJudge
from stages.core.training.online.settings import OnlineSettings
from stages.core.training.online.transitions import Rollout, Row, Transitions

Pool = Float[Tensor, "prompt candidate ..."]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a round."""

    place: int
    """Its number in the round, from 0."""
    prompt_id: str
    prompt: str
    caption: int
    """Its row of the captions' conditioning."""
    seed: int
    """Decides all noise of its chains, and which of them go on."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the prompts of a round are sampled and judged."""

    chains: Chains
    judge: StepJudge
    settings: OnlineSettings
    text: Conditioning
    """A row for each different caption."""
    round: int

    def rollout(self, prompts: Sequence[Prompt]) -> Rollout:
        """Sample some prompts together; what comes of each depends on its own seed alone."""
        captions = torch.tensor([prompt.caption for prompt in prompts])
        text = self.text.rows(captions).to(self.chains.model.device)
        if self.settings.method == "spo":
            return pools(self, prompts, text)
        return whole_chains(self, prompts, text)

    def judged(
        self, clean: Pool, prompts: Sequence[Prompt], text: Conditioning, number: int
    ) -> Float[np.ndarray, "prompt candidate"]:
        """Scores of estimates that were made before the step of that number; past the last, of finished images.

        UserError for a score that is not finite.
        """
        schedule = self.chains.schedule
        timestep = int(schedule.timesteps[number]) if number < len(schedule) else 0
        scores = self.judge(
            clean,
            [prompt.prompt for prompt in prompts],
            text,
            timestep=timestep,
            seeds=[seed_of(prompt.seed, "judge", number) for prompt in prompts],
        )
        for place, prompt in enumerate(prompts):
            if not np.isfinite(scores[place]).all():
                raise UserError(
                    f"round {self.round}: the judge gave {scores[place].tolist()} for the prompt "
                    f"{prompt.prompt!r} at timestep {timestep}; expected finite scores. Either the policy has "
                    "diverged (lower learning_rate), or the judge cannot score such an image"
                )
        return scores

    def row(self, prompt: Prompt, number: int, scores: np.ndarray) -> Row:
        """What all methods say of a transition."""
        return {
            "round": self.round,
            "place": prompt.place,
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.prompt,
            "seed": prompt.seed,
            "candidate": None,
            "inference_step": number,
            "timestep": int(self.chains.schedule.timesteps[number]),
            "scores": scores.astype(np.float32),
            "winner_candidate": None,
            "loser_candidate": None,
            "next_candidate": None,
            "advantage": None,
            "is_valid": True,
        }


@dataclass(frozen=True)
class Move:
    """A step that every candidate of a pool has taken."""

    number: int
    before: Pool
    after: Pool


def pools(sampler: Sampler, prompts: Sequence[Prompt], text: Conditioning) -> Rollout:
    """Chains that divide into pools of candidates, compared every few steps; SPO, Algorithm 1.

    Up to `divert_step` a chain goes alone. From there its step is drawn once for each candidate. After
    `inner_steps` steps the judge compares what the denoiser takes each candidate's clean latents for; the best
    and the worst are a pair where they are far enough apart. A candidate drawn at random goes on.
    """
    settings, chains = sampler.settings, sampler.chains
    walks = [generator(prompt.seed) for prompt in prompts]
    latents = first_noise(chains.model, walks)[:, None]
    found: list[tuple[Row, Transitions | None]] = []
    moves: list[Move] = []
    last = len(chains.schedule)
    for number in range(last):
        mean, sigma, clean = _step(chains, latents, number, text)
        if len(moves) == settings.inner_steps:
            chosen = _drawn(prompts, number, latents.shape[1])
            scores = sampler.judged(clean, prompts, text, number)
            found += _compared(sampler, prompts, moves, scores, chosen)
            latents, mean = (_only(values, chosen) for values in (latents, mean))
            moves = []
        size = settings.candidates_per_prompt if number >= settings.divert_step else 1
        after = mean + sigma * _noise(chains, walks, size)
        if number >= settings.divert_step:
            moves.append(Move(number, latents.expand_as(after).cpu(), after.cpu()))
        latents = after
    scores = sampler.judged(latents, prompts, text, last)
    found += _compared(sampler, prompts, moves, scores, [None] * len(prompts))
    return _rollout(prompts, found, chains.model.latents_shape)


def _step(
    chains: Chains, latents: Pool, number: int, text: Conditioning
) -> tuple[Pool, Float[Tensor, ""], Pool]:
    """(mean, standard deviation, estimate of the clean latents) of a pool's step."""
    shape = latents.shape
    with torch.no_grad():
        step = chains.step(
            latents.flatten(0, 1),
            torch.full((shape[0] * shape[1],), number),
            text.repeat_each(shape[1]),
        )
    return step.mean.reshape(shape), step.sigma[0], step.clean.reshape(shape)


def _noise(chains: Chains, walks: Sequence[torch.Generator], size: int) -> Pool:
    """A noise for each candidate of each prompt."""
    drawn = [first_noise(chains.model, [rng] * size) for rng in walks]
    return torch.stack(drawn)


def _drawn(prompts: Sequence[Prompt], number: int, size: int) -> list[int]:
    """Which candidate of each prompt goes on."""
    rngs = (generator(seed_of(prompt.seed, "next", number)) for prompt in prompts)
    return [int(torch.randint(size, (1,), generator=rng)) for rng in rngs]


def _only(values: Pool, chosen: Sequence[int]) -> Float[Tensor, "prompt 1 ..."]:
    return values[torch.arange(len(chosen)), torch.tensor(chosen)][:, None]


def _compared(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    moves: Sequence[Move],
    scores: Float[np.ndarray, "prompt candidate"],
    chosen: Sequence[int | None],
) -> Iterator[tuple[Row, Transitions | None]]:
    """For each prompt and step since the last comparison: its row, and the pair if it is clear.

    Nothing for a single candidate, which can be compared with none.
    """
    if scores.shape[1] < 2:
        return
    for place, prompt in enumerate(prompts):
        best, worst = best_worst(scores[place])
        is_valid = is_clear(
            scores[place, best], scores[place, worst], sampler.settings.min_preference_gap
        )
        for move in moves:
            row = sampler.row(prompt, move.number, scores[place]) | {
                "winner_candidate": best,
                "loser_candidate": worst,
                "next_candidate": chosen[place],
                "is_valid": is_valid,
            }
            sides = torch.tensor([best, worst])
            pair = _pair(
                prompt.caption,
                place,
                move.number,
                move.before[place, sides],
                move.after[place, sides],
            )
            yield row, pair if is_valid else None


def _pair(caption: int, chain: int, number: int, before: Tensor, after: Tensor) -> Transitions:
    nothing = torch.zeros(1)
    return Transitions(
        torch.tensor([caption]), torch.tensor([number]), torch.tensor([chain]),
        before[None], after[None], nothing, nothing,
    )  # fmt: skip


def _rollout(
    prompts: Sequence[Prompt],
    found: Sequence[tuple[Row, Transitions | None]],
    shape: tuple[int, ...],
) -> Rollout:
    """What was found, prompt by prompt: the order does not tell which prompts were sampled together."""
    ordered = sorted(found, key=lambda each: (each[0]["place"], each[0]["inference_step"]))
    pairs = [pair for _, pair in ordered if pair is not None]
    return Rollout(
        Transitions.joined([Transitions.none(2, shape), *pairs]), [row for row, _ in ordered]
    )


def whole_chains(sampler: Sampler, prompts: Sequence[Prompt], text: Conditioning) -> Rollout:
    """Several chains of each prompt to their ends, and the judge's scores of the finished images.

    ddpo: each chain has a first noise of its own; its transitions are trained on one by one. d3po: all chains of
    a prompt begin with one noise; those of the best and of the worst image are pairs, as in its published code.
    """
    settings, size = sampler.settings, sampler.settings.candidates_per_prompt
    is_paired = settings.method == "d3po"
    seeds = [
        (prompt.seed if is_paired else walk, walk)
        for prompt in prompts
        for walk in (seed_of(prompt.seed, "chain", candidate) for candidate in range(size))
    ]
    walked = sample_trajectories(sampler.chains, text.repeat_each(size), seeds)
    finished = walked.latents[:, -1].to(sampler.chains.model.device)
    pool = finished.reshape(len(prompts), size, *finished.shape[1:])
    scores = sampler.judged(pool, prompts, text, len(sampler.chains.schedule))
    moments = walked.latents.reshape(len(prompts), size, *walked.latents.shape[1:])
    if is_paired:
        moves = [
            Move(number, moments[:, :, number], moments[:, :, number + 1])
            for number in range(len(sampler.chains.schedule))
        ]
        found = list(_compared(sampler, prompts, moves, scores, [None] * len(prompts)))
        return _rollout(prompts, found, sampler.chains.model.latents_shape)
    rows = [
        sampler.row(prompt, number, scores[place, [candidate]]) | {"candidate": candidate}
        for place, prompt in enumerate(prompts)
        for candidate in range(size)
        for number in range(len(sampler.chains.schedule))
    ]
    steps = torch.arange(len(sampler.chains.schedule))
    captions = torch.tensor([prompt.caption for prompt in prompts])
    return Rollout(
        Transitions(
            caption=captions.repeat_interleave(size * len(steps)),
            number=steps.repeat(len(prompts) * size),
            chain=torch.arange(len(prompts) * size).repeat_interleave(len(steps)),
            before=walked.latents[:, :-1].flatten(0, 1)[:, None],
            after=walked.latents[:, 1:].flatten(0, 1)[:, None],
            log_probability=walked.log_probability.flatten(),
            advantage=torch.zeros(len(rows)),
        ),
        rows,
    )


def shares(items: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """The items in parts of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
