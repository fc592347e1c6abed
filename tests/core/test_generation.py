"""Rows that threads finish, and batches that are compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from stages.core.models.families import load_model
from stages.core.policies.generation import Row, finished
from tests import tiny_models
from tests.builders import settings


def batches(count: int, fails_at: int | None = None) -> Iterator[list[Callable[[], Row]]]:
    for number in range(count):
        if number == fails_at:
            raise ValueError("the sampler has failed")
        yield [partial(dict, batch=number, row=row) for row in range(3)]


def rows(made: Iterator[list[Row]]) -> list[tuple[object, object]]:
    return [(row["batch"], row["row"]) for batch in made for row in batch]


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_rows_come_in_the_order_of_their_batches(num_threads: int) -> None:
    assert rows(finished(batches(4), num_threads)) == [(b, r) for b in range(4) for r in range(3)]
    assert rows(finished(batches(0), num_threads)) == []


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_comes_after_the_rows_of_the_batches_before_it(num_threads: int) -> None:
    made, found = finished(batches(4, fails_at=2), num_threads), []
    with pytest.raises(ValueError, match="the sampler has failed"):
        for batch in made:
            found += batch
    assert len(found) == 6


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_of_a_row_is_raised(num_threads: int) -> None:
    def fails() -> Row:
        raise OSError("no such image")

    with pytest.raises(OSError, match="no such image"):
        list(finished(iter([[fails]]), num_threads))


def test_a_batch_is_finished_while_the_next_one_is_made() -> None:
    is_next_made = threading.Event()

    def made() -> Iterator[list[Callable[[], Row]]]:
        yield [lambda: {"waited": is_next_made.wait(20)}]  # a second thread: else none would set it
        is_next_made.set()
        yield []

    assert list(finished(made(), 1)) == [[{"waited": True}], []]


def test_only_batches_of_the_first_size_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def compile_(network: torch.nn.Module, *, dynamic: bool) -> Callable[..., object]:
        assert not dynamic

        def call(latents: torch.Tensor, *args: object, **kwargs: object) -> object:
            compiled.append(len(latents))
            return network(latents, *args, **kwargs)

        return call

    model = load_model(settings(tiny_models.sd15(tmp_path), "float32"), device=torch.device("cpu"))
    plain = model.load_denoiser()
    monkeypatch.setattr(torch, "compile", compile_)
    denoiser = model.load_denoiser().compile()
    for rows_of_batch in (4, 4, 1, 4):
        inputs = (
            torch.ones((rows_of_batch, *model.latents_shape)),
            torch.full((rows_of_batch,), 500),
            model.encode_text(["a cat"]).repeat(rows_of_batch),
        )
        with torch.no_grad():
            found, expected = (model.predict(each, *inputs) for each in (denoiser, plain))
        assert torch.equal(found, expected)
    assert compiled == [4, 4, 4]
