"""Lists of all candidates, and people's images against a policy's own: from candidates to an update."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages import (
    encode_preferences,
    import_preferences,
    mix_preferences,
    sample_candidates,
    score_candidates,
    select_pairs,
    select_prompts,
    update_policy,
)
from stages.core.artifacts.schemas import TRAINING_PAIRS
from stages.core.artifacts.tables import write_table
from stages.core.errors import UserError
from stages.core.method.listwise import rank_weights
from stages.core.method.selection import win_probabilities
from stages.core.training.settings import Execution
from tests.builders import read_rows

BETA = 5000.0


@pytest.fixture(scope="module")
def made_lists(
    sampled: list[sample_candidates.Args],
    scored: list[score_candidates.Args],
    selected: select_pairs.Args,
    tmp_path_factory: pytest.TempPathFactory,
) -> select_pairs.Args:
    """Lists of four candidates of each of two prompts."""
    folder = tmp_path_factory.mktemp("lists")
    candidates = replace(sampled[0], candidates_per_prompt=4, output=folder / "candidates.parquet")
    sample_candidates.main(candidates)
    rewards = replace(scored[0], candidates=candidates.output, output=folder / "rewards.parquet")
    score_candidates.main(rewards)
    args = replace(
        selected, candidates=(candidates.output,), rewards=(rewards.output,), strategy="listwise",
        candidates_per_prompt=4, output=folder / "pairs.parquet",
    )  # fmt: skip
    select_pairs.main(args)
    return args


@pytest.fixture(scope="module")
def mixed_lists(made_lists: select_pairs.Args, mixed: mix_preferences.Args) -> mix_preferences.Args:
    """Two lists with two human pairs: half of the lists."""
    output = made_lists.output.with_name("mix.parquet")
    args = replace(mixed, pairs=made_lists.output, seed_fraction=0.5, output=output)
    mix_preferences.main(args)
    return args


def by_prompt(path: Path) -> dict[str, list[dict[str, object]]]:
    groups: dict[str, list[dict[str, object]]] = {}
    for row in read_rows(path):
        groups.setdefault(str(row["prompt_id"]), []).append(row)
    return groups


def test_a_list_holds_every_candidate_once_best_against_worst(
    made_lists: select_pairs.Args,
) -> None:
    rewards = by_prompt(made_lists.rewards[0])
    lists = by_prompt(made_lists.output)
    assert lists.keys() == rewards.keys()
    for name, rows in lists.items():
        own = np.array([row["reward"] for row in rewards[name]])
        order = list(np.argsort(-own))
        sides = [(row["winner_candidate"], row["loser_candidate"]) for row in rows]
        assert sides == [(order[0], order[3]), (order[1], order[2])]
        expected = win_probabilities(own.astype(float), BETA / 2)
        for row in rows:
            for side in ("winner", "loser"):
                assert row[f"{side}_score"] == pytest.approx(
                    expected[row[f"{side}_candidate"]],
                    rel=1e-5,  # type: ignore[index]
                )
        assert [row["pair_id"] for row in rows] == [f"iter01-{name}-0", f"iter01-{name}-1"]


def test_a_mix_counts_lists_and_not_their_rows(mixed_lists: mix_preferences.Args) -> None:
    sources = [row["source"] for row in read_rows(mixed_lists.output)]
    assert sources == ["generated"] * 4 + ["human"] * 2


def updated_on(
    mixed_lists: mix_preferences.Args, updated: update_policy.Args, folder: Path, **changes: object
) -> list[dict[str, object]]:
    """The steps of an update on lists."""
    args = replace(
        updated, preferences=mixed_lists.output, listwise=True,
        settings=replace(updated.settings, batch_pairs=4, passes=2.0),
        output=folder / "policy", training=folder / "training.parquet", work=folder / "work",
        held_out_curve=folder / "curve.parquet", **changes,
    )  # fmt: skip
    update_policy.main(args)
    rows: list[dict[str, object]] = read_rows(args.training)
    return rows


def test_an_update_on_lists_has_the_published_loss_at_its_first_step(
    mixed_lists: mix_preferences.Args, updated: update_policy.Args, tmp_path: Path
) -> None:
    steps = updated_on(mixed_lists, updated, tmp_path / "whole")
    assert len(steps) == 2  # 4 lists, 4 a step, 2 passes
    expected = []
    for rows in by_prompt(mixed_lists.output).values():
        source = rows[0]["source"]
        if source == "human":
            expected += [1 / math.log(2) - 1 / math.log(3)] * len(rows)
            continue
        scores = [float(str(row[f"{side}_score"])) for row in rows for side in ("winner", "loser")]
        weights = rank_weights(torch.tensor(scores, dtype=torch.float64))
        expected.append(weights.triu().sum().item())
    assert len(expected) == 4
    # policy and reference are equal yet: each term is its weight times ln 2
    assert steps[0]["loss"] == pytest.approx(math.log(2) * np.mean(expected), rel=1e-5)
    parts = updated_on(
        mixed_lists, updated, tmp_path / "parts", execution=Execution(micro_batch_pairs=1)
    )
    for step, part in zip(steps, parts, strict=True):
        assert part["loss"] == pytest.approx(step["loss"], rel=1e-4)
        assert part["gradient_norm"] == pytest.approx(step["gradient_norm"], rel=1e-3)


def test_pairs_of_another_strategy_are_no_lists(
    mixed: mix_preferences.Args, updated: update_policy.Args, tmp_path: Path
) -> None:
    rows = read_rows(mixed.output)
    rows[0]["winner_score"] = 2.5
    path = tmp_path / "mix.parquet"
    write_table(path, rows, TRAINING_PAIRS, stage="mix_preferences", arguments={})
    args = replace(updated, preferences=path, listwise=True, output=tmp_path / "policy")
    with pytest.raises(UserError, match=r"row 0: .*scores \[2.5.*probabilities"):
        update_policy.main(args)


def test_spin_pairs_peoples_winners_with_the_policys_own_sample_of_their_caption(
    imported: import_preferences.Args,
    encoded: encode_preferences.Args,
    sampled: list[sample_candidates.Args],
    scored: list[score_candidates.Args],
    selected: select_pairs.Args,
    mixed: mix_preferences.Args,
    updated: update_policy.Args,
    tmp_path: Path,
) -> None:
    prompts = tmp_path / "prompts.parquet"
    select_prompts.main(
        select_prompts.Args(
            pool=(imported.preferences,), shuffle_seed=0, skip=0, take=2, output=prompts
        )
    )
    candidates = replace(
        sampled[0], prompts=prompts, candidates_per_prompt=1, shard=0, num_shards=1,
        output=tmp_path / "candidates.parquet",
    )  # fmt: skip
    sample_candidates.main(candidates)
    rewards = replace(scored[0], candidates=candidates.output, output=tmp_path / "rewards.parquet")
    score_candidates.main(rewards)
    args = replace(
        selected, candidates=(candidates.output,), rewards=(rewards.output,), strategy="spin",
        candidates_per_prompt=1, human=imported.preferences, human_latents=encoded.output,
        output=tmp_path / "pairs.parquet",
    )  # fmt: skip
    select_pairs.main(args)
    rows = read_rows(args.output)
    assert len(rows) == 2
    people = {row["pair_id"]: row for row in read_rows(imported.preferences)}
    latents = {row["pair_id"]: row for row in read_rows(encoded.output)}
    own = {row["prompt_id"]: row for row in read_rows(candidates.output)}
    for row in rows:
        (match,) = [
            name
            for name, person in people.items()
            if (person["source_file"], person["source_row"])
            == (row["source_file"], row["source_row"])
        ]
        assert people[match]["prompt_id"] == row["prompt_id"]
        assert row["winner"] == people[match]["winner"]
        assert row["winner_latents"] == latents[match]["winner_latents"]
        assert row["winner_geometry"] == latents[match]["winner_geometry"]
        assert row["loser"] == own[row["prompt_id"]]["image"]
        assert row["loser_seed"] == own[row["prompt_id"]]["seed"]
        assert row["source"] == "generated"
        unknown = ("winner_candidate", "winner_seed", "winner_score", "margin", "probability")
        assert {row[name] for name in unknown} == {None}
    mix = replace(mixed, pairs=args.output, seed_fraction=0.0, output=tmp_path / "mix.parquet")
    mix_preferences.main(mix)
    update = replace(
        updated, preferences=mix.output, output=tmp_path / "policy",
        training=tmp_path / "training.parquet", work=tmp_path / "work",
        held_out_curve=tmp_path / "curve.parquet",
    )  # fmt: skip
    update_policy.main(update)
    assert read_rows(update.training)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_spin_without_people_or_with_a_prompt_that_nobody_judged_is_refused(
    imported: import_preferences.Args,
    encoded: encode_preferences.Args,
    selected: select_pairs.Args,
    tmp_path: Path,
) -> None:
    args = replace(selected, strategy="spin", output=tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="give --human and --human-latents"):
        select_pairs.main(args)
    args = replace(args, human=imported.preferences, human_latents=encoded.output)
    with pytest.raises(UserError, match="has no pair of the prompt [0-9a-f]{16}"):
        select_pairs.main(args)
    assert not args.output.exists()
