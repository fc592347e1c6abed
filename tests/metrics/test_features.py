"""How far pictures of one prompt differ: in a CLIP's features, or to the eye."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stages.core.errors import UserError
from stages.core.evaluation.perception import lab_levels, perceptual_distance
from stages.metrics import PERCEPTUAL, WITH_CLIP, choose_features
from stages.metrics.features import cosine_diversity, load_measure
from stages.metrics.preprocessing import clip_input, hpsv2_input
from tests.metrics import independent
from tests.metrics.conftest import Published
from tests.metrics.official import SIZE

Pictures = NDArray[np.uint8]


def test_cosine_diversity_by_hand() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert cosine_diversity(rows) == pytest.approx((1 + 2 + 1) / 3)
    assert cosine_diversity(rows[[0, 0]]) == 0
    assert np.isnan(cosine_diversity(rows[:1]))


def unit_rows(published: Published, metric: str, pictures: Pictures) -> torch.Tensor:
    """The embeddings by the independent forward."""
    name = "clipscore" if metric == "aesthetics" else metric
    stored = torch.load(published.weights_file(name), weights_only=True)
    if metric == "hpsv2":
        weights, act = stored["state_dict"], independent.gelu
        pixels = [hpsv2_input(picture, SIZE, antialias=True) for picture in pictures]
    else:
        act = independent.gelu if metric == "pickscore" else independent.quick_gelu
        weights = independent.as_open_clip(stored)
        pixels = [clip_input(picture, SIZE) for picture in pictures]
    return independent.clip_image(weights, torch.stack(pixels), act=act)


@pytest.mark.parametrize("metric", WITH_CLIP)
def test_a_clips_diversity_equals_an_independent_forwards(
    metric: str, published: Published, pictures: Pictures
) -> None:
    groups = [pictures[:3], pictures[3:], pictures[[1, 1]]]
    found = load_measure(metric, published.options(metric))(groups)
    rows = unit_rows(published, metric, pictures).double()
    expected = np.mean([1 - float(a @ b) for a, b in combinations(rows[:3], 2)])
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert found[0] > 1e-4
    assert np.isnan(found[1])
    assert found[2] == pytest.approx(0, abs=1e-6)


def test_the_weightless_distance_is_the_mean_over_pairs(pictures: Pictures) -> None:
    (found,) = load_measure(PERCEPTUAL)([pictures])
    levels = [lab_levels(picture) for picture in pictures]
    expected = np.mean([perceptual_distance(a, b) for a, b in combinations(levels, 2)])
    assert found == pytest.approx(expected)


def test_auto_is_the_first_clip_in_use() -> None:
    assert choose_features("auto", ["pickscore", "imagereward", "aesthetics"]) == "aesthetics"
    assert choose_features("auto", ["hpsv2"]) == "hpsv2"
    assert choose_features("auto", ["total", "imagereward"]) == PERCEPTUAL
    assert choose_features("pickscore", ["aesthetics"]) == "pickscore"


def test_other_features_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        UserError, match="no features 'imagereward'; expected one of perceptual, cl"
    ):
        load_measure("imagereward")
