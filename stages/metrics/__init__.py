"""Scorers of images, one file each, behind one small interface.

Any package can add a metric through the entry point group `sail.metrics`; see docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from stages.core.errors import UserError
from stages.core.execution.runtime import progress
from stages.metrics import compression, pixels, shapes

if TYPE_CHECKING:
    import torch

Images = UInt8[np.ndarray, "image height width rgb"]


class Scorer(Protocol):
    """What scores images; it may have `spec`, a dictionary of what decides its numbers."""

    def __call__(self, *, images: Images, prompts: Sequence[str]) -> Float[np.ndarray, " image"]:
        """One score an image, higher is better, whatever else is in the batch."""
        ...


SCORERS: dict[str, Callable[[], Scorer]] = {
    **pixels.SCORERS,
    **compression.SCORERS,
    **shapes.SCORERS,
}
"""How to load each metric that needs no weights, by name."""

NETWORKS = ("pickscore", "hpsv2", "imagereward", "aesthetics", "clipscore")
"""Metrics that are networks: they need weights and go faster on a GPU."""

WITH_CLIP = ("clipscore", "aesthetics", "pickscore", "hpsv2")
"""Those whose CLIP can tell how far pictures differ; first those that learned from no preferences."""

PERCEPTUAL = "perceptual"
"""Colour differences that need no CLIP, in its place."""

GROUP = "sail.metrics"
"""Entry points of other packages: name of the metric = module:load, called load(options, device)."""

IMAGES_PER_BATCH = 64


def metric_names() -> list[str]:
    """Names of all metrics there are, those of other packages last."""
    return [*SCORERS, *NETWORKS, *_plugins()]


def needs_gpu(name: str) -> bool:
    """Whether the metric should have a GPU where there is one."""
    return name not in SCORERS


def choose_features(asked: str, metrics: Sequence[str]) -> str:
    """Whose features tell how far pictures differ; 'auto' is the first CLIP among the metrics."""
    if asked != "auto":
        return asked
    return next((name for name in WITH_CLIP if name in metrics), PERCEPTUAL)


def load_scorer(
    name: str, options: Mapping[str, str] | None = None, device: torch.device | None = None
) -> Scorer:
    """The metric of that name with its options from the config, on the device (default: the CPU).

    UserError lists the names there are, or says which option or weight file is wrong.
    """
    if name in SCORERS:
        if options:
            raise UserError(f"metric {name!r} has no options, found metrics.{name} in the config")
        return SCORERS[name]()
    import torch

    place = device or torch.device("cpu")
    if name in NETWORKS:
        return _network(name)(options or {}, place)
    if name not in _plugins():
        raise UserError(f"there is no metric {name!r}; expected one of {', '.join(metric_names())}")
    return _from_plugin(_plugins()[name], options or {}, place)


def score_in_batches(
    scorer: Scorer,
    images: Iterable[NDArray[np.uint8]],
    prompts: Sequence[str],
    batch: int = IMAGES_PER_BATCH,
) -> list[float]:
    """The metric's score of every image; neighbours of one size are scored together.

    No more than a batch of `images` is held. ValueError unless there is one for each prompt.
    """
    scores: list[float] = []
    waiting: list[tuple[NDArray[np.uint8], str]] = []

    def score() -> None:
        pictures, texts = zip(*waiting, strict=True)
        scores.extend(scorer(images=np.stack(pictures), prompts=texts).tolist())
        waiting.clear()

    for image, prompt in zip(images, progress(prompts, "scoring", "images"), strict=True):
        if waiting and (len(waiting) == batch or waiting[0][0].shape != image.shape):
            score()
        waiting.append((image, prompt))
    if waiting:
        score()
    return scores


def spec_of(scorer: Scorer) -> dict[str, Any]:
    """What decides the scorer's numbers: weights, options, versions; empty for plain functions."""
    return dict(getattr(scorer, "spec", {}))


def _network(name: str) -> Callable[[Mapping[str, str], torch.device], Scorer]:
    from stages.metrics.aesthetics import Aesthetics
    from stages.metrics.clipscore import ClipScore
    from stages.metrics.hpsv2 import HPSv2
    from stages.metrics.imagereward import ImageReward
    from stages.metrics.pickscore import PickScore

    kinds: Any = dict(
        zip(NETWORKS, (PickScore, HPSv2, ImageReward, Aesthetics, ClipScore), strict=True)
    )
    return kinds[name]


@cache
def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in (*SCORERS, *NETWORKS, *found):
            raise UserError(
                f"two metrics are called {point.name!r}; one is {point.value}, of the entry points "
                f"{GROUP!r}. Rename it or uninstall its package."
            )
        found[point.name] = point
    return found


def _from_plugin(point: EntryPoint, options: Mapping[str, str], device: torch.device) -> Scorer:
    try:
        load = point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"metric {point.name!r} ({point.value}) cannot be loaded: {error}"
        ) from error
    scorer: Scorer = load(options, device)
    return scorer
