"""The pairs of a training, of any number: from tables to files of tensors that a training maps.

A caption of FLUX.1 takes 4 MB and an image's latents 1 MB, so that some ten thousand pairs would fill a machine's
memory. They are written once, a few at a time, and read by row where a batch needs them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.artifacts.decisions import turned
from stages.core.artifacts.joins import refuse_other_pairs
from stages.core.artifacts.provenance import digest
from stages.core.artifacts.schemas import (
    LIKED_PAIRS,
    PAIR_LATENTS,
    PREFERENCES,
    TRAINING_PAIRS,
    Schema,
)
from stages.core.artifacts.tables import holds, read_batches, read_table
from stages.core.artifacts.tensor_files import (
    TensorFile,
    has_tensors,
    is_undamaged,
    map_tensors,
    writing_tensors,
)
from stages.core.execution.disk import writing
from stages.core.method.listwise import Lists
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.policies.encoding import (
    IMAGES_PER_BATCH,
    EncodedLikes,
    EncodedPairs,
    encode_stored_images,
    encoded_parts,
    geometries,
    latents_tensor,
)
from stages.core.policies.like_files import LikeTables

log = logging.getLogger(__name__)

SIDES = ("winner", "loser")
GEOMETRIES = [f"{side}_geometry" for side in SIDES]
SMALL_COLUMNS = ("prompt", "source", "probability", "prompt_id", "winner_score", "loser_score")
"""Of a mix, besides geometries."""


@dataclass(frozen=True, kw_only=True)
class PairTables:
    """Pairs as tables hold them. What is small is read; latents and images are read a few at a time."""

    prompts: Sequence[str]
    winner_geometry: Int[Tensor, "pair six"]
    """Original height and width, top and left of the crop, target height and width, in pixels."""
    loser_geometry: Int[Tensor, "pair six"]
    """The loser's."""
    latents: tuple[Path, Schema]
    """The table with the columns winner_latents and loser_latents."""
    images: tuple[Path, Schema] | None = None
    """The table with the images, to encode them again instead of reading their latents."""
    probability: Float[Tensor, " pair"] | None = None
    """That the winner is preferred, for soft labels."""
    lists: Lists | None = None
    """Which pairs make one ranked list, for the listwise loss."""
    rows: Sequence[int] | None = None
    """Where the pairs stand in their tables, in rising order; None: they are all of them."""
    flipped: frozenset[int] = frozenset()
    """The rows of which winner and loser are exchanged."""
    loser_prompts: Sequence[str] | None = None
    """The losers' prompts, where likes are put side by side; None: both images have one."""

    def decided(self, kept: Sequence[int], flipped: Iterable[int]) -> PairTables:
        """The pairs at the kept rows alone, winner and loser of the flipped ones exchanged."""
        swapped = torch.tensor([row in set(flipped) for row in kept])[:, None]
        winner, loser = self.winner_geometry[list(kept)], self.loser_geometry[list(kept)]
        return replace(
            self,
            prompts=[self.prompts[row] for row in kept],
            winner_geometry=torch.where(swapped, loser, winner),
            loser_geometry=torch.where(swapped, winner, loser),
            rows=kept,
            flipped=frozenset(flipped),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def captions(self) -> list[str]:
        """Each caption once, in order."""
        return sorted({*self.prompts, *(self.loser_prompts or ())})

    def opened(self, captions: TensorFile, latents: TensorFile) -> EncodedPairs:
        """The pairs as a training reads them, from the files of their captions and latents."""
        row_of = {prompt: row for row, prompt in enumerate(self.captions)}
        caption, loser_caption = (
            None if prompts is None else torch.tensor([row_of[prompt] for prompt in prompts])
            for prompts in (self.prompts, self.loser_prompts)
        )
        assert caption is not None
        return EncodedPairs(
            winner=latents.tensors["winner"],
            loser=latents.tensors["loser"],
            caption=caption,
            text=Conditioning(captions.tensors),
            winner_geometry=self.winner_geometry,
            loser_geometry=self.loser_geometry,
            probability=self.probability,
            lists=self.lists,
            loser_caption=loser_caption,
            files=(captions, latents),
        )

    def encoded(self, model: DiffusionModel) -> Iterator[dict[str, Tensor]]:
        """Latents of winners and losers in float32, a few pairs at a time."""
        path, schema = self.images or self.latents
        names = list(SIDES) if self.images else [f"{side}_latents" for side in SIDES]
        rows = range(len(self)) if self.rows is None else self.rows
        start = 0
        for read in read_batches(path, schema, names, size=IMAGES_PER_BATCH, rows=rows):
            batch = turned(read, rows[start : start + len(read)], self.flipped)
            start += len(read)
            yield {
                side: encode_stored_images(model, batch.column(name))
                if self.images
                else latents_tensor(batch.column(name), model.latents_shape, str(path))
                for side, name in zip(SIDES, names, strict=True)
            }


def human_pairs(
    preferences: Path, latents: Path, *, is_live: bool = False, num_pairs: int | None = None
) -> PairTables:
    """Human pairs and their latents, or the first so many; also held-out likes (schema liked_pairs).

    UserError unless both list the same pairs.
    """
    other = ["loser_prompt"] if holds(preferences, LIKED_PAIRS) else []
    schema = LIKED_PAIRS if other else PREFERENCES
    pairs = read_table(preferences, schema, ["pair_id", "prompt", *other])
    encoded = read_table(latents, PAIR_LATENTS, ["pair_id", *GEOMETRIES])
    refuse_other_pairs(pairs, encoded, latents)
    winner, loser = (geometries(encoded.column(name))[:num_pairs] for name in GEOMETRIES)
    return PairTables(
        prompts=pairs.column("prompt").to_pylist()[:num_pairs],
        winner_geometry=winner,
        loser_geometry=loser,
        latents=(latents, PAIR_LATENTS),
        images=(preferences, PREFERENCES) if is_live else None,
        loser_prompts=pairs.column("loser_prompt").to_pylist()[:num_pairs] if other else None,
    )


def mixed_pairs(
    path: Path,
    *,
    is_live: bool = False,
    label: Callable[[pa.Table, Path], Float[Tensor, " pair"]] | None = None,
    listed: Callable[[pa.Table, Path], Lists] | None = None,
) -> PairTables:
    """The pairs of a mix, with the soft labels and the lists that `label` and `listed` make of its small columns."""
    table = read_table(path, TRAINING_PAIRS, [*SMALL_COLUMNS, *GEOMETRIES])
    winner, loser = (geometries(table.column(name)) for name in GEOMETRIES)
    return PairTables(
        prompts=table.column("prompt").to_pylist(),
        winner_geometry=winner,
        loser_geometry=loser,
        latents=(path, TRAINING_PAIRS),
        images=(path, TRAINING_PAIRS) if is_live else None,
        probability=label(table, path) if label else None,
        lists=listed(table, path) if listed else None,
    )


@dataclass(frozen=True, kw_only=True)
class PairStore:
    """The files of some pairs: conditionings of their captions, and their latents.

    A file is used again where it has the same key: the training's identity, the captions, and the digests of the
    parts of the model that encode.
    """

    tables: PairTables | LikeTables
    folder: Path
    keys: Mapping[str, str]
    """The key of each file, by its name."""

    @classmethod
    def of(
        cls, model: DiffusionModel, tables: PairTables | LikeTables, folder: Path, identity: str
    ) -> PairStore:
        """The store in `folder`, whether it is there already or not."""
        parts = {
            "captions": (*model.encoder_parts,),
            "latents": ("vae",) if tables.images else (),
        }
        names = {"captions": tables.captions, "latents": list(model.latents_shape)}
        keys = {
            name: hashlib.sha256(
                json.dumps([identity, names[name], digests_of(model, parts[name])]).encode()
            ).hexdigest()
            for name in parts
        }
        return cls(tables=tables, folder=folder, keys=keys)

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self.folder / f"{name}.safetensors"

    @property
    def is_complete(self) -> bool:
        """Whether both files are there."""
        return all(has_tensors(self.path(name), key) for name, key in self.keys.items())

    def fill(self, model: DiffusionModel) -> None:
        """Encode and write what is not there, or is damaged. DiskError if there is no room."""
        if not self._has("captions"):
            self._remove("captions")
            captions = [*self.tables.captions, ""]
            with writing_tensors(
                self.path("captions"), len(captions), self.keys["captions"]
            ) as file:
                for part in encoded_parts(model, captions):
                    file.write(part.tensors)
        if not self._has("latents"):
            self._remove("latents")
            with writing_tensors(
                self.path("latents"), len(self.tables), self.keys["latents"]
            ) as file:
                for rows in self.tables.encoded(model):
                    file.write(rows)

    def open(self) -> EncodedPairs | EncodedLikes:
        """The pairs or likes as a training reads them. ArtifactError if a file is damaged."""
        captions, latents = map_tensors(self.path("captions")), map_tensors(self.path("latents"))
        return self.tables.opened(captions, latents)

    def _remove(self, name: str) -> None:
        """Make room for the new file: the disk may have none for both."""
        with writing(self.path(name)):
            self.path(name).unlink(missing_ok=True)

    def _has(self, name: str) -> bool:
        path = self.path(name)
        if not has_tensors(path, self.keys[name]):
            return False
        if is_undamaged(path):
            log.info("%s is there already", path)
            return True
        log.warning("%s is not what was written: the disk has damaged it. It is made anew", path)
        return False


def digests_of(model: DiffusionModel, parts: Sequence[str]) -> dict[str, str]:
    """What names the weights and words of some parts of a model: digests of its files, or a hub id.

    A part is a folder of the model, or of model.config where a file holds the transformer alone, or it lies with
    all others in one file. A part that is nowhere (SD3 without T5) has no digest.
    """
    others = {"vae": model.source.settings.vae}
    found = {}
    for part in parts:
        other = others.get(part)
        place = Path(other or model.source.rest)
        folder = place / part
        if other and not folder.is_dir():
            folder = place
        files = [place] if place.is_file() else sorted(f for f in folder.rglob("*") if f.is_file())
        found[part] = str(place)
        found |= {str(file): digest(file) for file in files}
    return found
