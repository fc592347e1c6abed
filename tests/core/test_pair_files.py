"""Pairs from tables to mapped files: the same numbers, of any number of pairs, and each side's own."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from stages.core.artifacts.schemas import PAIR_LATENTS
from stages.core.artifacts.tables import read_table, write_table
from stages.core.artifacts.tensor_files import TensorWriter, writing_tensors
from stages.core.method.noising import generator
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model
from stages.core.policies import encoding, pair_files
from stages.core.policies.encoding import EncodedPairs, encode_captions
from stages.core.policies.pair_files import PairStore, PairTables, digests_of
from stages.core.training.pair_data import encode
from stages.core.training.processes import Processes
from tests import flow_models
from tests.builders import CAPTIONS, settings
from tests.sd3_file import original_weights

CPU = torch.device("cpu")
NUM_PAIRS = 21
"""More than two batches of images."""


@pytest.fixture
def latents(model: DiffusionModel, tmp_path: Path) -> torch.Tensor:
    """Of both sides, written as a table."""
    values = torch.randn((2, NUM_PAIRS, *model.latents_shape), generator=generator(4))
    rows = [
        {
            "pair_id": f"pair{number}",
            "winner_latents": values[0, number].flatten().numpy(),
            "loser_latents": values[1, number].flatten().numpy(),
            "winner_geometry": np.arange(6) + number,
            "loser_geometry": np.arange(6) + 100 + number,
        }
        for number in range(NUM_PAIRS)
    ]
    write_table(
        tmp_path / "latents.parquet", rows, PAIR_LATENTS, stage="encode_preferences", arguments={}
    )
    return values


def tables(path: Path, prompts: list[str]) -> PairTables:
    table = read_table(path, PAIR_LATENTS, ["winner_geometry", "loser_geometry"])
    winner, loser = (torch.tensor(column.to_pylist()) for column in table.columns)
    return PairTables(
        prompts=prompts, winner_geometry=winner, loser_geometry=loser, latents=(path, PAIR_LATENTS)
    )


def test_the_files_hold_what_encoding_in_memory_gives(
    model: DiffusionModel,
    latents: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "CAPTIONS_PER_BATCH", 3)
    prompts = [CAPTIONS[number % 7] for number in range(NUM_PAIRS)]
    store = PairStore.of(model, tables(tmp_path / "latents.parquet", prompts), tmp_path, "one")
    assert not store.is_complete
    store.fill(model)
    assert store.is_complete
    found = store.open()
    assert torch.equal(found.winner, latents[0])
    assert torch.equal(found.loser, latents[1])
    assert found.winner_geometry[5].tolist() == [5, 6, 7, 8, 9, 10]
    assert found.loser_geometry[5].tolist() == [105, 106, 107, 108, 109, 110]
    expected = encode_captions(model, [*sorted(CAPTIONS[:7]), ""])
    assert found.text.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.text[name], tensor)
    chosen = torch.tensor([20, 4, 4])
    assert torch.equal(
        found.text.rows(found.caption[chosen])["text"],
        torch.stack([expected["text"][sorted(CAPTIONS[:7]).index(prompts[n])] for n in (20, 4, 4)]),
    )
    found.let_go()
    assert torch.equal(found.winner[chosen], latents[0][chosen])


def test_a_store_is_used_again_for_the_same_captions_model_and_training_alone(
    model: DiffusionModel, latents: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "latents.parquet"
    store = PairStore.of(model, tables(path, [CAPTIONS[0]] * NUM_PAIRS), tmp_path, "one")
    store.fill(model)
    for prompts, identity, expected in (
        ([CAPTIONS[0]] * NUM_PAIRS, "one", True),
        ([CAPTIONS[1]] * NUM_PAIRS, "one", False),
        ([CAPTIONS[0]] * NUM_PAIRS, "another", False),
    ):
        other = PairStore.of(model, tables(path, prompts), tmp_path, identity)
        assert other.is_complete == expected


def test_other_words_of_the_encoder_are_another_key(
    model: DiffusionModel, latents: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    for part in model.encoder_parts:
        (base / part).mkdir(parents=True)
        (base / part / "weights").write_text(part)
    monkeypatch.setattr(model.source, "base", str(base))
    pairs = tables(tmp_path / "latents.parquet", [CAPTIONS[0]] * NUM_PAIRS)
    first = PairStore.of(model, pairs, tmp_path, "one")
    assert PairStore.of(model, pairs, tmp_path, "one").keys == first.keys
    (base / model.encoder_parts[0] / "weights").write_text("another")
    other = PairStore.of(model, pairs, tmp_path, "one")
    assert other.keys["captions"] != first.keys["captions"]
    assert other.keys["latents"] == first.keys["latents"]


def test_of_a_table_with_more_pairs_the_first_ones_are_read(
    model: DiffusionModel, latents: torch.Tensor, tmp_path: Path
) -> None:
    few = tables(tmp_path / "latents.parquet", [CAPTIONS[0]] * 11)
    parts = list(few.encoded(model))
    assert [len(part["winner"]) for part in parts] == [8, 3]
    assert torch.equal(torch.cat([part["loser"] for part in parts]), latents[1][:11])


def test_a_part_is_named_by_its_own_files_alone(tmp_path: Path) -> None:
    base = flow_models.sd3(tmp_path, has_t5=False)
    model = load_model(settings(base), device=CPU)
    vae, single = tmp_path / "vae", tmp_path / "sd3.safetensors"
    shutil.copytree(base / "vae", vae)
    weights = original_weights(model.load_denoiser().network.state_dict())
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, single)
    parts = (*model.encoder_parts, "vae")
    own = {base / part for part in parts if not part.endswith("_3")}
    for given, folders in (
        (settings(base), own),
        (settings(single, config=str(base)), own),
        (settings(base, vae=str(vae)), own - {base / "vae"} | {vae}),
        (settings(base, vae=str(base)), own),
    ):
        found = digests_of(load_model(given, device=CPU), parts)
        files = [Path(name) for name in found if name not in parts]
        assert {file.parent for file in files} == folders


def test_files_of_other_settings_go_before_new_ones_are_written(
    model: DiffusionModel, latents: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tables(tmp_path / "latents.parquet", [CAPTIONS[0]] * NUM_PAIRS)
    PairStore.of(model, pairs, tmp_path, "one").fill(model)
    second = PairStore.of(model, pairs, tmp_path, "two")
    there: list[list[str]] = []

    @contextmanager
    def watched(path: Path, num_rows: int, key: str) -> Iterator[TensorWriter]:
        there.append(sorted(file.name for file in tmp_path.glob("*.safetensors")))
        with writing_tensors(path, num_rows, key) as file:
            yield file

    monkeypatch.setattr(pair_files, "writing_tensors", watched)
    second.fill(model)
    assert there == [["latents.safetensors"], ["captions.safetensors"]]
    assert second.is_complete


class OneOfTwo(Processes):
    """One of two threads that wait for each other, like processes whose collective calls give up after a second."""

    def __init__(self, number: int, barrier: threading.Barrier) -> None:
        self.number, self.barrier = number, barrier

    @property
    def is_main(self) -> bool:
        return self.number == 0

    def wait(self) -> None:
        self.barrier.wait(timeout=1)


@pytest.mark.slow
def test_nobody_waits_in_a_collective_call_while_files_that_are_there_are_read_again(
    model: DiffusionModel, latents: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tables(tmp_path / "latents.parquet", [CAPTIONS[0]] * NUM_PAIRS)
    fill = PairStore.fill

    def slowly(store: PairStore, model: DiffusionModel) -> None:
        time.sleep(2)
        fill(store, model)

    def run(process: OneOfTwo) -> EncodedPairs:
        return encode(model, {"own": pairs}, tmp_path / "work", "one", process)["own"]

    monkeypatch.setattr(PairStore, "fill", slowly)
    for _ in range(2):  # the second time the files, and the word that they are ready, are there
        barrier = threading.Barrier(2)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(run, [OneOfTwo(number, barrier) for number in range(2)]))
        assert all(torch.equal(found.winner, latents[0]) for found in both)
