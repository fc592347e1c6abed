"""The order in which a round's transitions are trained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from stages.core.method.seeding import seed_of
from stages.core.training.online.settings import OnlineSettings
from stages.core.training.online.transitions import Transitions


def batches(
    transitions: Transitions, settings: OnlineSettings, seed: int
) -> Iterator[Int[Tensor, " batch"]]:
    """The items of each optimizer step, pass after pass; a pass's last batch may be smaller.

    spo, d3po: all items shuffled. ddpo: images shuffled, and the steps of each; a batch is of whole images.
    """
    for number in range(settings.passes):
        rng = np.random.default_rng(seed_of(seed, "pass", number))
        order = rng.permutation(len(transitions))
        if settings.method == "ddpo":
            chains = transitions.chain.numpy()
            place_of = rng.permutation(int(chains.max()) + 1 if len(chains) else 0)
            order = order[np.argsort(place_of[chains[order]], kind="stable")]
        for start in range(0, len(order), settings.batch_transitions):
            yield torch.from_numpy(order[start : start + settings.batch_transitions])
