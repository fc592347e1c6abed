"""Single likes from a file to a policy: encoded, trained on, measured by pairs side by side, and mixed with none."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages import (
    encode_preferences,
    import_preferences,
    inspect,
    join_latents,
    mix_preferences,
    score_holdout,
    select_prompts,
    train_seed,
)
from stages.core.artifacts.provenance import policy_digest
from stages.core.artifacts.schemas import LIKE_LATENTS, LIKED_PAIRS, LIKES, PAIR_LATENTS
from stages.core.artifacts.tables import read_table, write_table
from stages.core.errors import UserError
from stages.core.inspection.runs import open_runs, shared_data
from stages.core.models.adapter import DiffusionModel
from stages.core.policies.pair_files import human_pairs
from stages.core.preflight.data import labelled_pairs
from stages.core.preflight.findings import Findings
from stages.core.training.held_out import HeldOutFiles
from tests.builders import CAPTIONS, LORA, read_rows, settings
from tests.label_files import WRITERS, some_pairs
from tests.stages.test_import_likes import ALONE, likes_args, write_likes
from tests.stages.test_processes import elsewhere, finish, start, without_speed


@pytest.fixture(scope="module")
def liked(tmp_path_factory: pytest.TempPathFactory) -> import_preferences.Args:
    """Eight images to train on, of which six were liked, and two pairs of others that are held out."""
    folder = tmp_path_factory.mktemp("likes")
    write_likes(folder / "data", ALONE)
    args = likes_args(folder / "data", num_holdout=2)
    import_preferences.main(args)
    return args


@pytest.fixture(scope="module")
def trained(
    liked: import_preferences.Args, seed_trained: train_seed.Args, tiny_base: str
) -> train_seed.Args:
    """Four steps of seed training on the likes."""
    folder = liked.preferences.parent
    for path in (liked.preferences, liked.holdout):
        asked = encode_preferences.Args(
            preferences=path,
            model=settings(tiny_base),
            batch=3,
            output=path.with_name(f"{path.stem}_latents.parquet"),
        )
        encode_preferences.main(asked)
    args = replace(
        elsewhere(seed_trained, folder / "iter00", loss="kto", caption_dropout=0.3),
        preferences=liked.preferences,
        latents=folder / "preferences_latents.parquet",
        held_out=HeldOutFiles(
            preferences=liked.holdout, latents=folder / "holdout_latents.parquet",
            num_pairs=2, num_draws=2, every_steps=2,
        ),
    )  # fmt: skip
    train_seed.main(args)
    return args


def test_each_likes_latents_are_those_of_its_image(
    trained: train_seed.Args, model: DiffusionModel
) -> None:
    likes, latents = (
        read_table(trained.preferences, LIKES),
        read_table(trained.latents, LIKE_LATENTS),
    )
    assert likes.column("image_id") == latents.column("image_id")
    [row] = likes.slice(5, 1).to_pylist()
    image = encode_preferences.prepare(
        [row], kind=encode_preferences.OF_LIKES, size=model.image_size, source=Path("here")
    )
    expected = model.encode_images(image.pixels).flatten()
    found = torch.tensor(latents.column("latents")[5].as_py())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert latents.column("geometry")[5].as_py() == image.geometry[0]


def test_a_policy_is_trained_from_single_likes_and_measured_on_the_held_out_ones(
    trained: train_seed.Args,
) -> None:
    steps = read_rows(trained.training)
    assert len(steps) == 4  # eight images, two a step
    assert steps[0]["loss"] == pytest.approx(0.5 * np.mean(first_weights(trained)), rel=1e-5)
    assert policy_digest(trained.output)
    curve = read_rows(trained.held_out_curve)
    assert [point["step"] for point in curve] == [0, 2, 4]
    assert curve[0]["accuracy"] == 0.5
    assert curve[0]["log_loss"] == pytest.approx(math.log(2))
    assert len(curve[0]["pair_log_losses"]) == 2
    assert curve[-1]["winner_error"] != 0


def first_weights(args: train_seed.Args) -> list[float]:
    """Weights of the first batch's images: six of eight are liked, and both kinds count half."""
    from stages.core.method.seeding import seed_of
    from stages.core.training.loop import order_of

    is_liked = [row["is_liked"] for row in read_rows(args.preferences)]
    order = order_of(8, 8, seed_of(args.seed, "train_seed"))[:2].tolist()
    return [0.5 / 0.75 if is_liked[row] else 0.5 / 0.25 for row in order]


def test_held_out_likes_have_a_caption_each(trained: train_seed.Args) -> None:
    tables = human_pairs(trained.held_out.preferences, trained.held_out.latents)
    rows = read_table(trained.held_out.preferences, LIKED_PAIRS).to_pylist()
    assert tables.prompts == [row["prompt"] for row in rows]
    assert tables.loser_prompts == [row["loser_prompt"] for row in rows]
    assert all(row["prompt"] != row["loser_prompt"] for row in rows)
    assert set(tables.captions) == {*tables.prompts, *(tables.loser_prompts or ())}


def test_images_that_are_encoded_again_have_the_same_loss(
    trained: train_seed.Args, tmp_path: Path
) -> None:
    args = replace(elsewhere(trained, tmp_path), live_encoding=True)
    train_seed.main(args)
    for row, other in zip(
        without_speed(args.training), without_speed(trained.training), strict=True
    ):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_two_processes_train_a_lora_on_likes_as_one_does(
    trained: train_seed.Args, tmp_path: Path
) -> None:
    alone, shared = (
        replace(elsewhere(trained, tmp_path / name, batch_pairs=4), lora=LORA)
        for name in ("alone", "shared")
    )
    train_seed.main(alone)
    finish(start(shared, 2))
    found, expected = without_speed(shared.training), without_speed(alone.training)
    assert len(found) == len(expected) == 2
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_the_judge_is_asked_about_each_held_out_image_with_its_own_prompt(
    trained: train_seed.Args, tmp_path: Path, tiny_base: str
) -> None:
    args = score_holdout.Args(
        preferences=trained.held_out.preferences, latents=trained.held_out.latents,
        model=settings(tiny_base), policy=str(trained.output), reference="base", num_draws=2,
        dpo_beta=500.0, seed=0, output=tmp_path / "rewards.parquet",
    )  # fmt: skip
    score_holdout.main(args)
    found = read_rows(args.output)
    rows = read_table(args.preferences, LIKED_PAIRS).to_pylist()
    assert [row["pair_id"] for row in found] == [row["pair_id"] for row in rows]
    for row in rows:
        row["loser_prompt"] = row["prompt"]
    one_prompt = tmp_path / "one_prompt.parquet"
    write_table(one_prompt, rows, LIKED_PAIRS, stage="import_preferences", arguments={})
    score_holdout.main(replace(args, preferences=one_prompt, output=tmp_path / "other.parquet"))
    other = read_rows(tmp_path / "other.parquet")
    for row, changed in zip(found, other, strict=True):
        assert row["winner_policy_errors"] == pytest.approx(changed["winner_policy_errors"])
        assert row["loser_policy_errors"] != pytest.approx(changed["loser_policy_errors"], rel=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "mapo"])
def test_a_loss_that_compares_images_is_refused(
    trained: train_seed.Args, tmp_path: Path, loss: str
) -> None:
    with pytest.raises(UserError, match=f"train_seed.loss is '{loss}', which compares two images"):
        train_seed.main(elsewhere(trained, tmp_path, loss=loss))
    assert not (tmp_path / "policy").exists()


def test_likes_of_one_kind_decisions_and_latents_of_other_images_are_refused(
    trained: train_seed.Args, tmp_path: Path
) -> None:
    rows = read_table(trained.preferences, LIKES).to_pylist()
    one_sided = tmp_path / "one_sided.parquet"
    write_table(
        one_sided, [{**row, "is_liked": True} for row in rows], LIKES,
        stage="import_preferences", arguments={},
    )  # fmt: skip
    args = elsewhere(trained, tmp_path)
    with pytest.raises(UserError, match=r"all 8 images of .* are liked; KTO needs some of both"):
        train_seed.main(replace(args, preferences=one_sided))
    with pytest.raises(UserError, match="set train_seed.use_decisions to false"):
        train_seed.main(replace(args, decisions=(tmp_path / "decisions.parquet",)))
    others = tmp_path / "others.parquet"
    write_table(others, rows[::-1], LIKES, stage="import_preferences", arguments={})
    with pytest.raises(UserError, match="does not list the same images"):
        train_seed.main(replace(args, preferences=others))


def test_no_share_of_likes_is_mixed_in_and_a_mix_without_any_needs_no_pairs(
    trained: train_seed.Args, mixed: mix_preferences.Args, tmp_path: Path
) -> None:
    args = replace(
        mixed,
        preferences=trained.preferences,
        latents=trained.latents,
        output=tmp_path / "mix.parquet",
    )
    with pytest.raises(UserError, match="mix_preferences.seed_fraction is .* single likes"):
        mix_preferences.main(args)
    mix_preferences.main(replace(args, seed_fraction=0.0))
    found = read_rows(args.output)
    assert found
    assert {row["source"] for row in found} == {"generated"}
    assert len(found) == len(read_rows(mixed.pairs))


def test_likes_that_shards_encode_join_to_the_table_of_one_job(
    trained: train_seed.Args, tmp_path: Path, tiny_base: str
) -> None:
    whole = encode_preferences.Args(
        preferences=trained.preferences, model=settings(tiny_base), output=tmp_path / "whole.parquet",
        batch=3,
    )  # fmt: skip
    shards = [
        replace(whole, shard=number, num_shards=2, output=tmp_path / f"{number}.parquet")
        for number in range(2)
    ]
    for args in (whole, *shards):
        encode_preferences.main(args)
    joined = join_latents.Args(
        preferences=whole.preferences, shards=tuple(args.output for args in shards), batch=3,
        output=tmp_path / "joined.parquet",
    )  # fmt: skip
    join_latents.main(joined)
    found, expected = (read_table(path, LIKE_LATENTS) for path in (joined.output, whole.output))
    assert found.equals(expected)


def test_a_broken_image_of_a_like_is_named(
    trained: train_seed.Args, tmp_path: Path, tiny_base: str
) -> None:
    rows = read_table(trained.preferences, LIKES).to_pylist()
    rows[3]["image"] = {"bytes": b"no image", "path": None}
    broken = tmp_path / "likes.parquet"
    write_table(broken, rows, LIKES, stage="import_preferences", arguments={})
    args = encode_preferences.Args(
        preferences=broken, model=settings(tiny_base), output=tmp_path / "latents.parquet"
    )
    with pytest.raises(Exception, match=f"like {rows[3]['image_id']}, the image"):
        encode_preferences.main(args)


def test_prompts_of_both_held_out_images_are_kept_out_of_the_iterations(
    liked: import_preferences.Args, tmp_path: Path
) -> None:
    pool = tmp_path / "pool.txt"
    pool.write_text("\n".join(CAPTIONS[:14]))
    args = select_prompts.Args(
        pool=(pool,), exclude=(liked.preferences, liked.holdout), shuffle_seed=0, skip=0, take=None,
        output=tmp_path / "prompts.parquet",
    )  # fmt: skip
    select_prompts.main(args)
    assert {row["prompt"] for row in read_rows(args.output)} == set(CAPTIONS[12:14])


def test_inspect_knows_the_tables_of_likes(trained: train_seed.Args) -> None:
    for path in (trained.preferences, trained.latents, trained.held_out.preferences):
        text = "\n".join(inspect.lines_of(inspect.Args(path=path)))
        assert "is_liked" in text or "like_latents" in text or "loser_prompt" in text
        assert "unknown" not in text


def test_compare_tells_likes_by_prompt_image_and_label(
    liked: import_preferences.Args, tmp_path: Path
) -> None:
    rows = read_table(liked.preferences, LIKES).to_pylist()
    turned = [
        {**row, "is_liked": row["is_liked"] != (place == 0)} for place, row in enumerate(rows)
    ]
    for name, some in (("one", rows), ("two", turned)):
        seed = tmp_path / name / "seed"
        seed.mkdir(parents=True)
        write_table(
            seed / "preferences.parquet", some, LIKES, stage="import_preferences", arguments={}
        )
        shutil.copy(liked.holdout, seed / "holdout.parquet")
    found = {
        what: counts
        for what, *counts in shared_data(*open_runs(tmp_path / "one", tmp_path / "two"))
    }
    assert found["seed/preferences: human labels"] == [8, 8, 7]
    assert found["seed/holdout: human labels"] == [2, 2, 2]


def test_preflight_counts_likes_and_names_what_compares_images(
    liked: import_preferences.Args, tmp_path: Path
) -> None:
    block = {
        "files": [str(file) for file in liked.files], "layout": "auto", "unpaired": True,
        "num_pairs": 8, "num_holdout": 2,
    }  # fmt: skip
    findings = Findings()
    assert labelled_pairs({"preferences": block}, findings) == 12
    assert not findings.failed
    assert findings.checks[-1][1] == "those of 12 labels can be read"
    findings = Findings()
    labelled_pairs({"preferences": block | {"num_holdout": 3}}, findings)
    assert findings.failed == ["preferences.num_pairs"]
    WRITERS["pairs-csv"][1](tmp_path / "pairs", some_pairs())
    findings = Findings()
    assert (
        labelled_pairs({"preferences": block | {"files": [str(tmp_path / "pairs")]}}, findings) == 0
    )
    assert "has the layout 'pairs', which compares images" in findings.checks[0][1]


def test_the_held_out_latents_are_those_of_pairs(trained: train_seed.Args) -> None:
    table = read_table(trained.held_out.latents, PAIR_LATENTS)
    names = read_table(trained.held_out.preferences, LIKED_PAIRS).column("pair_id")
    assert table.column("pair_id") == names
