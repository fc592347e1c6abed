"""The head that LAION's aesthetics predictor and ImageReward share: five linear layers in a row."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

SIZES = (1024, 128, 64, 16, 1)
NAMES = (0, 2, 4, 6, 7)
"""Places of the linear layers in the published lists; dropouts stand between."""


class Head(nn.Module):
    """Linear layers without activations, named as published; in scoring one affine map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, *SIZES[:-1])
        linear = {
            name: nn.Linear(columns, rows)
            for name, columns, rows in zip(NAMES, widths, SIZES, strict=True)
        }
        self.layers = nn.Sequential(*(linear.get(place, nn.Identity()) for place in range(8)))

    def forward(self, rows: Float[Tensor, "image channel"]) -> Float[Tensor, " image"]:
        """One number a row."""
        numbers: Tensor = self.layers(rows)
        return numbers.squeeze(-1)
