"""The encoded pairs of a training: the main process writes them, all processes map them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from stages.core.models.adapter import DiffusionModel
from stages.core.policies.encoding import EncodedPairs
from stages.core.policies.pair_files import PairStore, PairTables
from stages.core.training.processes import Processes

POLL_SECONDS = 0.5


def encode(
    model: DiffusionModel,
    trained: PairTables,
    held_out: PairTables | None,
    folder: Path,
    identity: str,
    processes: Processes,
) -> tuple[EncodedPairs, EncodedPairs | None]:
    """The pairs to train on and those that are scored on the way, in files below `folder`.

    Neither VAE nor text encoder is kept. Files that an interrupted training of the same identity has left are
    used again.
    """
    stores = [
        PairStore.of(model, tables, folder / name, identity)
        for name, tables in (("trained", trained), ("held_out", held_out))
        if tables is not None
    ]
    if processes.is_main:
        for store in stores:
            store.fill(model)
    else:
        _await(stores)
    processes.wait()
    model.release("vae", *model.encoder_parts)
    found = [store.open() for store in stores]
    return found[0], found[1] if held_out is not None else None


def _await(stores: Sequence[PairStore]) -> None:
    """Wait without a collective call, which may give up after some minutes. The launcher ends who waits in vain."""
    while not all(store.is_complete for store in stores):
        time.sleep(POLL_SECONDS)
