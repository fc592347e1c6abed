"""The encoded pairs of a training: the main process writes them, all processes map them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.core.execution.disk import writing
from stages.core.models.adapter import DiffusionModel
from stages.core.policies.encoding import EncodedLikes, EncodedPairs
from stages.core.policies.like_files import LikeTables
from stages.core.policies.pair_files import PairStore, PairTables
from stages.core.training.processes import Processes

POLL_SECONDS = 0.5


def encode_any(
    model: DiffusionModel,
    tables: Mapping[str, PairTables | LikeTables | None],
    folder: Path,
    identity: str,
    processes: Processes,
) -> dict[str, EncodedPairs | EncodedLikes]:
    """The pairs or likes of each table that is there, by its name, in files below `folder`.

    Neither VAE nor text encoder is kept. Files that an interrupted training of the same identity has left are
    used again. The others wait for the main process without a collective call, which may give up after some minutes;
    the launcher ends who waits in vain. DiskError if there is no room.
    """
    stores = {
        name: PairStore.of(model, table, folder / name, identity)
        for name, table in tables.items()
        if table is not None
    }
    ready = folder / "ready"
    if processes.is_main:
        ready.unlink(missing_ok=True)
    processes.wait()  # a moment: nobody takes an earlier training's word
    if processes.is_main:
        for store in stores.values():
            store.fill(model)
        with writing(ready):
            folder.mkdir(parents=True, exist_ok=True)
            ready.touch()
    else:
        _await(ready, list(stores.values()))
    processes.wait()
    model.release("vae", *model.encoder_parts)
    return {name: store.open() for name, store in stores.items()}


def encode(
    model: DiffusionModel,
    tables: Mapping[str, PairTables | None],
    folder: Path,
    identity: str,
    processes: Processes,
) -> dict[str, EncodedPairs]:
    """As `encode_any`, of pairs alone."""
    found = encode_any(model, tables, folder, identity, processes)
    return {name: each for name, each in found.items() if isinstance(each, EncodedPairs)}


def _await(ready: Path, stores: Sequence[PairStore]) -> None:
    """Wait for the main process's word, and until its files are seen from here."""
    while not (ready.is_file() and all(store.is_complete for store in stores)):
        time.sleep(POLL_SECONDS)
