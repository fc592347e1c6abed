"""The loss of a whole ranked list of images instead of one pair of them: RankDPO.

Karthik et al., "Scalable Ranked Preference Optimization for Text-to-Image Generation", Eq. 5 to 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Lists:
    """Which rows of a table of pairs belong to one list, and how good each image is held to be.

    A list of N images lies in N / 2 rows, best against worst, second against second to last, and so on; a
    pair is a list of two.
    """

    rows: tuple[Int[Tensor, " _"], ...]
    """The rows of each list."""
    winner: Float[Tensor, " pair"]
    """Probability that the winner of a row is preferred to another image of its list, in [0, 1]."""
    loser: Float[Tensor, " pair"]
    """The same of its loser."""

    def members(self, lists: Int[Tensor, " list"]) -> tuple[Tensor, Tensor]:
        """(rows of some lists, for each row the place of its list among them)."""
        chosen = [self.rows[number] for number in lists.tolist()]
        sizes = torch.tensor([len(rows) for rows in chosen])
        return torch.cat(chosen), torch.arange(len(chosen)).repeat_interleave(sizes)


def rank_weights(preference: Float[Tensor, " image"]) -> Float[Tensor, "image image"]:
    """How much each two images of a list count: the difference of their gains and of their discounts.

    abs(G_i - G_j) abs(1/D_i - 1/D_j) with gain G = 2^preference - 1 and discount D = log(1 + rank), rank 1 being
    the most preferred. RankDPO, Eq. 6.
    """
    rank = torch.empty_like(preference)
    order = torch.argsort(preference, descending=True, stable=True)
    rank[order] = torch.arange(1, len(order) + 1, dtype=rank.dtype, device=rank.device)
    gain, discount = torch.exp2(preference) - 1, 1 / torch.log1p(rank)
    return (gain[:, None] - gain).abs() * (discount[:, None] - discount).abs()


def listwise_loss(
    policy: Float[Tensor, " image"],
    reference: Float[Tensor, " image"],
    preference: Float[Tensor, " image"],
    dpo_beta: float,
) -> Float[Tensor, ""]:
    """Sum over all two images i preferred to j of weight_ij * -log sigmoid(-dpo_beta/2 * (s_i - s_j)).

    s is the policy's less the reference's error of an image, all images of a list at one draw. RankDPO, Eq. 7, with
    beta = dpo_beta / 2, as in `preference_logit`.
    """
    moved = policy - reference
    logits = -0.5 * dpo_beta * (moved[:, None] - moved)
    is_preferred = preference[:, None] > preference
    losses = -functional.logsigmoid(logits) * rank_weights(preference).to(logits.dtype)
    return torch.where(is_preferred, losses, torch.zeros_like(losses)).sum()


def lists_of(
    names: Sequence[str | None],
    winner: Sequence[float | None],
    loser: Sequence[float | None],
) -> Lists:
    """The lists of a table's rows: those of one name make one, a row without a name one of its own.

    A row without scores is certain: its winner has probability 1, its loser 0. Where a winner's score is the
    smaller one a person has exchanged the two: they then have each other's.
    """
    groups: dict[object, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(row if name is None else name, []).append(row)
    scores = [
        (1.0, 0.0) if high is None or low is None else (max(high, low), min(high, low))
        for high, low in zip(winner, loser, strict=True)
    ]
    high, low = torch.tensor(scores, dtype=torch.float32).reshape(-1, 2).unbind(dim=1)
    return Lists(tuple(torch.tensor(rows) for rows in groups.values()), high, low)
