"""train_seed and update_policy: what they write, when they write nothing, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from stages import (
    encode_preferences,
    import_preferences,
    mix_preferences,
    train_seed,
    update_policy,
)
from stages.core.artifacts.provenance import ArtifactError, policy_digest
from stages.core.errors import UserError
from stages.core.models.adapter import DiffusionModel
from stages.core.models.policy import Policy
from stages.core.training.loop import Training, TrainingError
from stages.core.training.settings import Execution
from tests.builders import LORA, read_rows


def elsewhere(args: train_seed.Args, folder: Path) -> train_seed.Args:
    return replace(
        args, output=folder / "policy", training=folder / "training.parquet", work=folder / "work"
    )


def test_seed_training_writes_a_finished_policy_and_one_row_a_step(
    seed_trained: train_seed.Args, model: DiffusionModel
) -> None:
    manifest = json.loads((seed_trained.output / "manifest.json").read_text())
    assert (manifest["num_pairs"], manifest["num_steps"]) == (4, 2)
    assert sorted(manifest["files"]) == [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert len(policy_digest(seed_trained.output)) == 16
    rows = read_rows(seed_trained.training)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] == pytest.approx(manifest["last_loss"])
    assert not seed_trained.work.exists()
    trained, base = model.load_denoiser(Policy(seed_trained.output)), model.load_denoiser()
    changes = [
        (a - b).abs().max().item()
        for a, b in zip(trained.parameters(), base.parameters(), strict=True)
    ]
    assert 0 < max(changes) < 1e-3


def test_seed_training_run_again_has_the_same_weights(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    again = elsewhere(seed_trained, tmp_path)
    train_seed.main(again)
    assert policy_digest(again.output) == policy_digest(seed_trained.output)


def test_a_policy_folder_keeps_no_weights_of_the_other_kind(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    full = elsewhere(seed_trained, tmp_path)
    lora = replace(full, lora=LORA)
    for args, expected in (
        (full, {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}),
        (lora, {"pytorch_lora_weights.safetensors"}),
        (full, {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}),
    ):
        train_seed.main(args)
        assert set(json.loads((args.output / "manifest.json").read_text())["files"]) == expected
    assert policy_digest(full.output) == policy_digest(seed_trained.output)


def test_live_encoding_gives_the_same_loss(seed_trained: train_seed.Args, tmp_path: Path) -> None:
    live = replace(elsewhere(seed_trained, tmp_path), live_encoding=True)
    train_seed.main(live)
    for row, other in zip(read_rows(live.training), read_rows(seed_trained.training), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)


def interrupted(args: train_seed.Args, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A training that ends before its first step; the files of encoded pairs that it leaves."""

    def fail(self: Training) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run", fail)
        with pytest.raises(KeyboardInterrupt):
            train_seed.main(args)
    return sorted(args.work.rglob("*.safetensors"))


def test_a_training_that_is_started_again_encodes_nothing_twice(
    seed_trained: train_seed.Args,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = elsewhere(seed_trained, tmp_path)
    files = interrupted(args, monkeypatch)
    assert [str(file.relative_to(args.work)) for file in files] == [
        "pairs/held_out/captions.safetensors",
        "pairs/held_out/latents.safetensors",
        "pairs/trained/captions.safetensors",
        "pairs/trained/latents.safetensors",
    ]
    before = [file.stat().st_ino for file in files]
    assert interrupted(args, monkeypatch) == files
    assert [file.stat().st_ino for file in files] == before
    with caplog.at_level("INFO"):
        train_seed.main(args)
    assert caplog.text.count("is there already") == 4
    assert policy_digest(args.output) == policy_digest(seed_trained.output)
    assert not args.work.exists()


def test_encoded_pairs_that_the_disk_has_damaged_are_said_and_made_anew(
    seed_trained: train_seed.Args,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = elsewhere(seed_trained, tmp_path)
    *_, captions, latents = interrupted(args, monkeypatch)
    data = bytearray(captions.read_bytes())
    data[-5] ^= 1
    captions.write_bytes(data)
    latents.write_bytes(latents.read_bytes()[:-1])
    train_seed.main(args)
    assert f"{captions} is not what was written: the disk has damaged it" in caplog.text
    assert policy_digest(args.output) == policy_digest(seed_trained.output)


def test_encoded_pairs_of_another_training_are_not_used(
    seed_trained: train_seed.Args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = elsewhere(seed_trained, tmp_path)
    interrupted(replace(args, seed=1), monkeypatch)
    before = {file: file.stat().st_mtime_ns for file in args.work.rglob("*.safetensors")}
    after = {file: file.stat().st_mtime_ns for file in interrupted(args, monkeypatch)}
    assert before.keys() == after.keys()
    assert all(after[file] > written for file, written in before.items())


def test_tensorboard_shows_the_steps_and_the_held_out_curve_of_the_tables(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = replace(elsewhere(seed_trained, tmp_path), trackers=("tensorboard",))
    train_seed.main(args)
    assert policy_digest(args.output) == policy_digest(seed_trained.output)
    events = EventAccumulator(str(args.training.parent / "trackers" / "train_seed"))
    events.Reload()
    for table, prefix in ((args.training, ""), (args.held_out_curve, "held_out/")):
        rows = [row for row in read_rows(table) if row["step"] > 0]
        for name in rows[0].keys() - {"step", "pair_log_losses"}:  # a tracker draws numbers
            seen = [(event.step, event.value) for event in events.Scalars(prefix + name)]
            assert seen == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows], name


def test_a_tracker_that_is_not_installed_is_named(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    args = replace(elsewhere(seed_trained, tmp_path), trackers=("wandb",))
    with pytest.raises(UserError, match="tracker wandb is not installed: pip install wandb"):
        train_seed.main(args)
    assert not args.output.exists()


def test_an_update_starts_from_its_policy_and_leaves_it_untouched(
    updated: update_policy.Args, seed_trained: train_seed.Args
) -> None:
    rows = read_rows(updated.training)
    assert [row["step"] for row in rows] == [1, 2, 3]  # 5 pairs, 2 a step
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    names = {policy_digest(seed_trained.output), policy_digest(updated.output)}
    assert len(names) == 2
    manifest = json.loads((updated.output / "manifest.json").read_text())
    assert set(manifest["sail_inputs"]) == {
        str(updated.preferences),
        str(seed_trained.output / "manifest.json"),
        *map(str, updated.held_out.files),
    }


def test_an_update_against_base_starts_with_another_loss(
    updated: update_policy.Args, tmp_path: Path
) -> None:
    args = replace(
        updated,
        reference="base",
        output=tmp_path / "policy",
        work=tmp_path / "work",
        training=tmp_path / "training.parquet",
    )
    update_policy.main(args)
    assert read_rows(args.training)[0]["winner_error"] != 0


def with_probabilities(
    updated: update_policy.Args, folder: Path, probability: float | None
) -> update_policy.Args:
    """The same update on the same mix, whose generated pairs have this probability."""
    table = pq.read_table(updated.preferences)
    column = table.schema.get_field_index("probability")
    values = [
        probability if source == "generated" else None
        for source in table.column("source").to_pylist()
    ]
    folder.mkdir()
    path = folder / "mix.parquet"
    pq.write_table(
        table.set_column(column, table.schema.field(column), pa.array(values, pa.float32())), path
    )
    return replace(
        updated, preferences=path, soft_labels=True, output=folder / "policy", work=folder / "work",
        training=folder / "training.parquet", held_out_curve=folder / "curve.parquet",
    )  # fmt: skip


def test_soft_labels_of_1_train_as_hard_ones_and_others_pull_less(
    updated: update_policy.Args, tmp_path: Path
) -> None:
    weights = {}
    for name, probability in (("sure", 1.0), ("unsure", 0.6)):
        args = with_probabilities(updated, tmp_path / name, probability)
        update_policy.main(args)
        (file,) = (args.output / "unet").glob("*.safetensors")
        weights[name] = load_file(file)
    (file,) = (updated.output / "unet").glob("*.safetensors")
    hard = load_file(file)
    assert all(torch.allclose(weights["sure"][k], v, atol=1e-7) for k, v in hard.items())
    assert not all(torch.equal(weights["unsure"][k], v) for k, v in hard.items())
    losses = [row["loss"] for row in read_rows(tmp_path / "unsure" / "training.parquet")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # at a logit of 0 whatever the label


@pytest.mark.parametrize("probability", [None, float("nan"), 1.5])
def test_a_generated_pair_without_a_probability_has_no_soft_label(
    updated: update_policy.Args, tmp_path: Path, probability: float | None
) -> None:
    args = with_probabilities(updated, tmp_path / "made", probability)
    with pytest.raises(UserError, match=r"mix.parquet, row 0: a generated pair has the probab"):
        update_policy.main(args)
    assert not args.output.exists()


def test_a_training_that_diverges_writes_no_policy_and_keeps_its_state(
    seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    settings = replace(seed_trained.settings, learning_rate=1e30)
    args = replace(elsewhere(seed_trained, tmp_path), settings=settings)
    args = replace(args, execution=Execution(save_every=1))
    with pytest.raises(TrainingError, match="stopped at step 2: loss nan"):
        train_seed.main(args)
    assert not args.output.exists()
    assert not args.training.exists()
    assert (args.work / "state.json").is_file()


def test_latents_of_other_pairs_are_refused(
    seed_trained: train_seed.Args, imported: import_preferences.Args, tmp_path: Path
) -> None:
    args = replace(elsewhere(seed_trained, tmp_path), preferences=imported.holdout)
    with pytest.raises(UserError, match="does not list the same pairs.*run encode_preferences"):
        train_seed.main(args)


def test_an_unfinished_policy_is_refused(
    updated: update_policy.Args, seed_trained: train_seed.Args, tmp_path: Path
) -> None:
    (tmp_path / "half" / "unet").mkdir(parents=True)
    args = replace(updated, policy=str(tmp_path / "half"), output=tmp_path / "policy")
    with pytest.raises(ArtifactError, match="manifest.json"):
        update_policy.main(args)


def test_a_single_pair_is_refused(
    updated: update_policy.Args, mixed: mix_preferences.Args, tmp_path: Path
) -> None:
    one = tmp_path / "one.parquet"
    pq.write_table(pq.read_table(mixed.output).slice(0, 1), one)
    args = replace(
        updated,
        preferences=one,
        output=tmp_path / "policy",
        work=tmp_path / "work",
        training=tmp_path / "training.parquet",
    )
    with pytest.raises(UserError, match="at least 2 preference pairs, found 1"):
        update_policy.main(args)
    assert not args.output.exists()


def test_latents_of_another_base_are_refused(
    seed_trained: train_seed.Args, encoded: encode_preferences.Args, tmp_path: Path
) -> None:
    table = pq.read_table(encoded.output)
    short = pa.array([[0.0] * 16] * len(table), table.schema.field("winner_latents").type)
    column = table.schema.get_field_index("winner_latents")
    table = table.set_column(column, table.schema.field(column), short)
    pq.write_table(table, tmp_path / "latents.parquet")
    args = replace(elsewhere(seed_trained, tmp_path), latents=tmp_path / "latents.parquet")
    with pytest.raises(UserError, match="made with another base model"):
        train_seed.main(args)


def test_the_stages_threads_are_set(seed_trained: train_seed.Args) -> None:
    assert seed_trained.threads == 1
    assert torch.get_num_threads() == 1
