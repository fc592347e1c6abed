"""What to ask about next: pairs that a judge is unsure of, and that look unlike what was labelled already.

A third of the prompts is left out of it, and asked about at random: only of these may pairs be held out, since
chance alone has chosen them. Whether the rest teaches more than pairs at random is not known (docs/labelling.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from stages.core.artifacts.images import ImageError, decode_image
from stages.core.artifacts.kept_rows import write_batches
from stages.core.artifacts.provenance import policy_files, policy_name
from stages.core.artifacts.schemas import JUDGED_IMAGES
from stages.core.artifacts.tables import read_metadata, read_table
from stages.core.data.prompts import prompt_id
from stages.core.evaluation.perception import SMALLEST, lab_levels
from stages.core.execution.runtime import choose_device, log, progress
from stages.core.labelling.gallery import Gallery, digest_of_image
from stages.core.labelling.pairs import Pair
from stages.core.labelling.places import Place

if TYPE_CHECKING:
    from stages.core.policies.judging import Judging

UNSURE_SHARE = 0.25
"""Of the pairs that are left: so many, of the smallest margins, count as uncertain."""
MOST_UNSURE = 256
"""Not more than so many, so that a key is answered at once."""
RANDOM_EVERY = 3
"""One pair in so many is drawn at random, and one prompt in so many is kept for that."""


@dataclass(frozen=True)
class Judged:
    """One image as the judge and a far look have it."""

    reward: float
    view: Float[np.ndarray, " cell_colour"]


def far_view(image: Image.Image) -> Float[np.ndarray, " cell_colour"]:
    """The picture from far away: CIELAB of 8 x 8 cells, as perception's coarsest level has it.

    It is squeezed to a square first, so that pictures of any shape can be compared.
    """
    square = image.convert("RGB").resize((8 * SMALLEST, 8 * SMALLEST), Image.Resampling.BOX)
    return lab_levels(np.asarray(square))[-1].reshape(-1)


def distances(
    one: Float[np.ndarray, "one cell_colour"], other: Float[np.ndarray, "other cell_colour"]
) -> Float[np.ndarray, "one other"]:
    """Root mean square colour difference (CIE 1976) of the cells of each view to each other one."""
    squared = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    return np.sqrt(np.maximum(squared, 0) / (one.shape[1] / 3))


class Chooser:
    """Chooses pairs by what is known of their images."""

    def __init__(self, judged: Mapping[str, Judged]) -> None:
        self._views = {name: image.view for name, image in judged.items()}
        self._rewards = {name: image.reward for name, image in judged.items()}
        self._margins: dict[str, float] = {}

    def margin(self, pair: Pair) -> float:
        """How far apart the judge has the images, mean over each two of them; infinite where it is not known.

        Of two images p(winner > loser) is nearest to a half where this is smallest, whatever beta.
        """
        if pair.key in self._margins:
            return self._margins[pair.key]
        rewards = [self._rewards.get(place.name, np.nan) for place in pair.places]
        apart = np.mean([abs(one - other) for one, other in combinations(rewards, 2)])
        self._margins[pair.key] = float(apart) if np.isfinite(apart) else float("inf")
        return self._margins[pair.key]

    def choose(self, pairs: Sequence[Pair], seen: Iterable[str]) -> Pair:
        """Of the pairs of which the judge is least sure the one that looks least like what was `seen`.

        `seen` names images. A pair's distance is that of each of its images to the nearest one that was
        seen, mean over its images. Before anything was seen it is the least sure pair.
        """
        count = min(MOST_UNSURE, max(1, round(UNSURE_SHARE * len(pairs))))
        unsure = sorted(pairs, key=lambda pair: (self.margin(pair), pair.key))[:count]
        unsure = [pair for pair in unsure if np.isfinite(self.margin(pair))]
        known = [self._views[name] for name in sorted(set(seen)) if name in self._views]
        if not unsure or not known:
            return unsure[0] if unsure else pairs[0]
        names = [place.name for pair in unsure for place in pair.places]
        nearest = distances(np.stack([self._views[name] for name in names]), np.stack(known)).min(1)
        far = dict(zip(names, nearest.tolist(), strict=True))
        return max(unsure, key=lambda pair: np.mean([far[place.name] for place in pair.places]))


def is_turn_of_random(num_answered: int) -> bool:
    """Whether the next pair is one at random, for who has answered so many that not everybody sees."""
    return num_answered % RANDOM_EVERY == 0


def judge_images(
    path: Path, gallery: Gallery, pairs: Sequence[Pair], judging: Judging, *, threads: int
) -> Chooser:
    """A chooser by the rewards of all images of some pairs, which are kept in a table for the next start.

    The table is made anew where images, pairs, policy or settings are others.
    """
    places: dict[str, dict[str, Place]] = {}
    for pair in pairs:
        places.setdefault(pair.prompt, {}).update({place.name: place for place in pair.places})
    of_prompts = {prompt: list(named.values()) for prompt, named in places.items()}
    names = [place.name for some in of_prompts.values() for place in some]
    # What is left at its default is not told: a new setting makes no table anew.
    told = {each.name for each in fields(judging) if getattr(judging, each.name) != each.default}
    arguments = json.loads(json.dumps(
        {name: value for name, value in asdict(judging).items() if name in told}
        | {"policy": policy_name(judging.policy), "record": _text(judging.record),
                           "reference": policy_name(judging.reference),
                           "images": _digest_of_all(gallery.digests(names))}
    ))  # fmt: skip
    if path.is_file() and read_metadata(path).get("arguments") == arguments:
        log.info("label: %s has what the judge says of %d images", path, len(names))
    else:
        _write(path, gallery, of_prompts, judging, arguments, threads)
    rows = read_table(path, JUDGED_IMAGES, ["image_name", "reward", "view"]).to_pylist()
    return Chooser(
        {row["image_name"]: Judged(row["reward"], np.array(row["view"])) for row in rows}
    )


def _write(
    path: Path, gallery: Gallery, of_prompts: Mapping[str, Collection[Place]], judging: Judging,
    arguments: object, threads: int,
) -> None:  # fmt: skip
    # This brings torch, which nobody waits for who is asked about pairs at random.
    from stages.core.policies.judging import ImageJudge

    judge = ImageJudge(judging, choose_device(threads))

    def batches(first: int) -> Iterator[list[dict[str, Any]]]:
        waiting = list(of_prompts.items())[first:]
        for prompt, places in progress(waiting, "judging images", "prompts"):
            yield _rows(judge.rewards, gallery, prompt, places)

    inputs = [*policy_files(judging.policy), *policy_files(judging.reference)]
    inputs += [judging.record] if judging.record else []
    write_batches(
        path, batches, JUDGED_IMAGES, stage="label", arguments=arguments, inputs=inputs
    )  # fmt: skip


def _rows(
    rewards: Callable[[str, str, Sequence[Image.Image]], list[tuple[float, float | None]]],
    gallery: Gallery,
    prompt: str,
    places: Collection[Place],
) -> list[dict[str, Any]]:
    """The rows of a prompt's images; of none that cannot be read."""
    images: dict[str, Image.Image] = {}
    digests: dict[str, str] = {}
    for place, data in gallery.read(places):
        if data is not None:
            try:
                images[place.name] = decode_image(data, str(place))
            except ImageError as error:
                log.warning("label: the judge cannot see an image: %s", error)
                continue
            digests[place.name] = digest_of_image(data)
    if not images:
        return []
    name = prompt_id(prompt)
    found = rewards(name, prompt, list(images.values()))
    return [
        {
            "prompt_id": name,
            "prompt": prompt,
            "image_name": each,
            "image_digest": digests[each],
            "reward": reward,
            "standard_error": error,
            "view": far_view(image).astype(np.float32),
        }
        for (each, image), (reward, error) in zip(images.items(), found, strict=True)
    ]


def _digest_of_all(digests: Mapping[str, str]) -> str:
    whole = json.dumps(sorted(digests.items()))
    return blake2b(whole.encode(), digest_size=16).hexdigest()


def _text(path: Path | None) -> str | None:
    return None if path is None else blake2b(path.read_bytes(), digest_size=16).hexdigest()
