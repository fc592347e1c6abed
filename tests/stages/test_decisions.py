"""What a person decided about pairs, in the mix: vetoes leave, flips exchange, the stale do nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages import (
    encode_preferences,
    import_preferences,
    mix_preferences,
    select_pairs,
    train_seed,
)
from stages.core.artifacts.decisions import DECISIONS, exchanged, image_digest
from stages.core.artifacts.provenance import read_manifest
from stages.core.artifacts.schemas import PAIR_LATENTS, PREFERENCES, TRAINING_PAIRS
from stages.core.artifacts.tables import read_metadata, read_table, write_table
from stages.core.errors import UserError
from stages.update_policy import soft_labels
from tests.builders import Row, read_rows


def decision(pair: Mapping[str, Any], kind: str, **changes: Any) -> Row:
    """A decision about a pair as its table has it."""
    names = ("pair_id", "iteration", "prompt_id", "prompt", "policy_digest", "winner_seed", "loser_seed",
             "source_file", "source_row")  # fmt: skip
    return {
        **{name: pair[name] for name in names},
        "winner_digest": image_digest(pair["winner"]["bytes"]),
        "loser_digest": image_digest(pair["loser"]["bytes"]),
        "decision": kind,
        "was_blind": False,
        "decided_at": "2026-11-27T00:00:00+00:00",
        **changes,
    }


def mix(args: mix_preferences.Args, decisions: list[Row], folder: Path) -> dict[str, Row]:
    """The pairs of a mix made with these decisions, by their names."""
    path, output = folder / "decisions.parquet", folder / "mix.parquet"
    write_table(path, decisions, DECISIONS, stage="audit", arguments={})
    mix_preferences.main(replace(args, decisions=(path,), output=output))
    assert str(path) in read_metadata(output)["inputs"]
    return {row["pair_id"]: row for row in read_rows(output)}


def test_a_vetoed_pair_leaves_and_a_flipped_one_exchanges_everything_of_its_two_images(
    mixed: mix_preferences.Args, selected: select_pairs.Args, tmp_path: Path
) -> None:
    first, second, *others = read_rows(selected.output)
    made = mix(mixed, [decision(first, "veto"), decision(second, "flip")], tmp_path)
    assert first["pair_id"] not in made
    found = made[second["pair_id"]]
    sides = [name for name in second if name.startswith("winner")]
    assert len(sides) == 6
    for name in sides:
        other = name.replace("winner", "loser")
        assert (found[name], found[other]) == (second[other], second[name]), name
    assert found["margin"] == -second["margin"]
    assert found["margin_standard_error"] == second["margin_standard_error"]
    assert found["probability"] == 1
    for row in others:
        assert made[row["pair_id"]] == row


def test_the_human_share_counts_what_is_left(
    mixed: mix_preferences.Args, selected: select_pairs.Args, tmp_path: Path
) -> None:
    pairs = read_rows(selected.output)
    args = replace(mixed, seed_fraction=0.5)
    made = mix(args, [decision(pair, "veto") for pair in pairs[:2]], tmp_path)
    assert [row["source"] for row in made.values()].count("human") == len(pairs) - 2


def test_decisions_about_human_pairs_apply_and_leave_the_other_draws_alone(
    mixed: mix_preferences.Args,
    imported: import_preferences.Args,
    encoded: encode_preferences.Args,
    tmp_path: Path,
) -> None:
    args = replace(mixed, seed_fraction=0.4)  # three of four
    before = [name for name in mix(args, [], tmp_path) if name.startswith("human")]
    human = {row["pair_id"]: row for row in read_rows(imported.preferences)}
    latents = {row["pair_id"]: row for row in read_rows(encoded.output)}
    assert (len(before), len(human)) == (3, 4)
    vetoed, flipped, same = before
    decisions = [decision(human[vetoed], "veto"), decision(human[flipped], "flip")]
    made = mix(args, decisions, tmp_path)
    [fourth] = set(human) - set(before)
    assert {name for name in made if name.startswith("human")} == {flipped, same, fourth}
    assert made[flipped]["winner"] == human[flipped]["loser"]
    assert made[flipped]["winner_latents"] == latents[flipped]["loser_latents"]
    assert made[same] == {**human[same], **latents[same]}


def test_decisions_about_other_images_are_stale_whatever_the_pairs_name(
    mixed: mix_preferences.Args, selected: select_pairs.Args, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    first, second, *_ = read_rows(selected.output)
    stale = decision(first, "veto", winner_digest=image_digest(b"an image of an earlier policy"))
    made = mix(mixed, [stale, decision(second, "flip")], tmp_path)
    assert made[first["pair_id"]] == first
    with caplog.at_level(logging.INFO):
        mix(mixed, [stale, decision(second, "flip")], tmp_path)
    assert "of 2 decisions 0 veto and 1 flip generated pairs" in caplog.text
    assert "1 are stale" in caplog.text


def test_a_decision_is_about_a_prompt_too(
    mixed: mix_preferences.Args, selected: select_pairs.Args, tmp_path: Path
) -> None:
    first, second, *_ = read_rows(selected.output)
    elsewhere = decision(first, "veto", prompt_id=second["prompt_id"])
    assert mix(mixed, [elsewhere], tmp_path)[first["pair_id"]] == first


def test_a_flip_says_which_image_is_better_also_where_the_judge_now_says_so_too(
    mixed: mix_preferences.Args, selected: select_pairs.Args, tmp_path: Path
) -> None:
    first = read_rows(selected.output)[0]
    found = decision(first, "flip")
    turned = found | {
        "winner_digest": found["loser_digest"], "loser_digest": found["winner_digest"]
    }  # fmt: skip
    assert mix(mixed, [turned], tmp_path)[first["pair_id"]] == first


def test_without_decisions_the_mix_is_what_it_was(
    mixed: mix_preferences.Args, tmp_path: Path
) -> None:
    made = mix(mixed, [], tmp_path)
    assert list(made.values()) == read_rows(mixed.output)


def test_vetoing_every_pair_is_refused_with_what_to_do(
    mixed: mix_preferences.Args, selected: select_pairs.Args, tmp_path: Path
) -> None:
    vetoes = [decision(pair, "veto") for pair in read_rows(selected.output)]
    with pytest.raises(UserError, match=r"all 4 pairs of .* are vetoed in .*stages\.audit"):
        mix(mixed, vetoes, tmp_path)


def test_decisions_do_not_fit_another_tables_schema(
    mixed: mix_preferences.Args, selected: select_pairs.Args, tmp_path: Path
) -> None:
    args = replace(mixed, decisions=(selected.output,), output=tmp_path / "mix.parquet")
    with pytest.raises(UserError, match=r"pairs.parquet has no column 'winner_digest'"):
        mix_preferences.main(args)


def test_a_flip_is_certain_where_labels_are_soft(
    mixed: mix_preferences.Args, selected: select_pairs.Args, tmp_path: Path
) -> None:
    first, second, *_ = read_rows(selected.output)
    mix(mixed, [decision(first, "flip")], tmp_path)
    path = tmp_path / "mix.parquet"
    names = read_table(path, TRAINING_PAIRS, ["pair_id"]).column(0).to_pylist()
    labels = dict(zip(names, soft_labels(read_table(path, TRAINING_PAIRS), path), strict=True))
    assert labels[first["pair_id"]] == 1
    assert labels[second["pair_id"]] == pytest.approx(second["probability"])


def test_flipping_twice_is_no_change_but_for_the_judges_own_probability(
    selected: select_pairs.Args,
) -> None:
    pairs = read_table(selected.output, TRAINING_PAIRS)
    again = exchanged(exchanged(pairs))
    for name in pairs.column_names:
        if name != "probability":
            assert again.column(name).equals(pairs.column(name)), name
    assert set(again.column("probability").to_pylist()) == {1.0}


def test_the_seed_training_heeds_decisions_that_it_is_given(
    seed_trained: train_seed.Args, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(name: str, **changes: Any) -> Any:
        folder = tmp_path / name
        args = replace(
            seed_trained, output=folder / "policy", training=folder / "training.parquet",
            held_out_curve=folder / "curve.parquet", work=folder / "work", **changes,
        )  # fmt: skip
        train_seed.main(args)
        return read_manifest(args.output)["files"]

    human = read_table(seed_trained.preferences, PREFERENCES)
    latents = read_table(seed_trained.latents, PAIR_LATENTS)
    first, second, *_ = human.to_pylist()
    stale = decision(first, "flip", loser_digest=image_digest(b"another image"))
    path = tmp_path / "decisions.parquet"
    decisions = [decision(first, "veto"), decision(second, "flip"), stale]
    write_table(path, decisions, DECISIONS, stage="audit", arguments={})
    with caplog.at_level(logging.INFO):
        made = train("decided", decisions=(path,))
    assert "of 3 decisions 1 veto and 1 flip a pair" in caplog.text
    assert "1 are stale" in caplog.text
    edited = {}
    for name, table, schema in (("p", human, PREFERENCES), ("l", latents, PAIR_LATENTS)):
        rows = pa.concat_tables([exchanged(table.slice(1, 1)), table.slice(2)])
        edited[name] = tmp_path / f"{name}.parquet"
        write_table(edited[name], rows, schema, stage="test", arguments={})
    assert made == train("edited", preferences=edited["p"], latents=edited["l"])
    assert made != read_manifest(seed_trained.output)["files"]
    assert str(path) in read_manifest(tmp_path / "decided/policy")["sail_inputs"]
    write_table(path, [decision(pair, "veto") for pair in human.to_pylist()], DECISIONS, stage="audit", arguments={})  # fmt: skip
    with pytest.raises(UserError, match="all 4 pairs of .* are vetoed"):
        train("nothing", decisions=(path,))
