"""The difference of two models' errors as one derivative, which rounding does not swallow.

A policy is near its reference, so its errors are near the reference's: in bfloat16 most of their
difference is rounding. Here the difference is never taken. Let m be the weights half way between the two
models' and d the policy's minus the reference's. By the midpoint rule

    prediction(policy) - prediction(reference) = J(m) d + O(|d|^3),

with J(m) d the directional derivative of the prediction, which forward-mode differentiation computes
beside prediction(m) in one pass. Its rounding is relative to itself, however small it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from stages.core.method.scoring import Judge, about_the_middle
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser

Weights = Mapping[str, Tensor]

LARGEST_SHARE = 1 / 8
"""How large the scaled direction is beside the weights: far from float16's ends on either side."""
NORMS = (
    torch.nn.functional.group_norm,
    torch.nn.functional.layer_norm,
    torch.nn.functional.rms_norm,
)
PRODUCTS_AT_ONCE = 2**27
"""Of queries and keys: half a gigabyte in float32, some of which are kept at a time."""


@dataclass(frozen=True)
class Derivative(Judge):
    """A policy and its reference as weights half way between, and the direction from one to the other."""

    network: Any
    """The denoiser's network; its own weights are not used."""
    middle: Weights
    direction: Weights
    """Times `scale`."""
    scale: float

    @classmethod
    def between(cls, network: Any, policy: Weights, reference: Weights) -> Derivative:
        """The two models' float32 weights, brought to the network's device and precision."""
        like = dict(network.named_parameters())
        scale = _scale(policy, reference)
        middle, direction = {}, {}
        for name, value in like.items():
            to, ours = policy[name], reference[name]
            middle[name] = ((to + ours) / 2).to(value.device, value.dtype)
            direction[name] = ((to - ours) * scale).to(value.device, value.dtype)
        return cls(network, middle, direction, scale)

    def moved(self, share: float) -> Derivative:
        """The same direction from a point that is `share` of the way off the middle, towards the policy."""
        middle = {
            name: value + self.direction[name] * (share / self.scale)
            for name, value in self.middle.items()
        }
        return Derivative(self.network, middle, self.direction, self.scale)

    def errors(
        self,
        model: DiffusionModel,
        noised: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
        context: Conditioning,
        target: Float[Tensor, "row ..."],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(policy's errors, reference's errors, mean squared difference of predictions) of each row."""

        def prediction(weights: Weights) -> Tensor:
            denoiser = Denoiser(self.network)
            denoiser.forward = partial(_with_weights, self.network, weights)
            return model.predict(denoiser, noised, timesteps, context)

        with Differentiable(), sdpa_kernel(SDPBackend.MATH):
            middle, scaled = jvp(prediction, (self.middle,), (self.direction,))  # type: ignore[misc]
        return about_the_middle(middle, scaled.float() / self.scale, target)


@dataclass(frozen=True)
class TwoPoints(Judge):
    """The mean of the derivatives at Gauss's two points: exact up to the fifth order, at twice the cost."""

    first: Derivative
    second: Derivative

    @classmethod
    def of(cls, middle: Derivative) -> TwoPoints:
        """Beside a derivative half way between."""
        share = 0.5 / math.sqrt(3)
        return cls(middle.moved(-share), middle.moved(share))

    def errors(
        self,
        model: DiffusionModel,
        noised: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
        context: Conditioning,
        target: Float[Tensor, "row ..."],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(policy's errors, reference's errors, mean squared difference of predictions) of each row."""
        first, second = (
            point.errors(model, noised, timesteps, context, target)
            for point in (self.first, self.second)
        )
        policy, reference, drift = (
            (one + other) / 2 for one, other in zip(first, second, strict=True)
        )
        return policy, reference, drift


def _with_weights(network: Any, weights: Weights, *args: Any, **kwargs: Any) -> Any:
    """A network called with other weights than its own."""
    return functional_call(network, dict(weights), args, kwargs)


class Differentiable(TorchFunctionMode):
    """What a network calls, so that its derivative fits into half precision and into memory.

    Norms are taken in float32: the derivative of one has the third power of a standard deviation's inverse,
    which float16 has not. Attention is taken in parts of its queries, which do not meet each other: the
    fused kernels have no derivative, and the plain one keeps every product of a query and a key.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The same function, taken otherwise."""
        named = kwargs or {}
        if func in NORMS:
            return func(*map(_wide, args), **_wide(named)).to(args[0].dtype)
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = [name for name in ("query", "key", "value") if name in named]
            query, *rest = (*args, *(named[name] for name in names))
            named = {name: value for name, value in named.items() if name not in names}
            keys = rest[0].shape[-2]
            at_once = max(1, PRODUCTS_AT_ONCE // (math.prod(query.shape[:-2]) * keys))
            parts = query.split(at_once, dim=-2)
            return torch.cat([func(part, *rest, **named) for part in parts], dim=-2)
        return func(*args, **named)


def _wide(value: Any) -> Any:
    """Half precision as float32, in a dictionary too; anything else as it is."""
    if isinstance(value, dict):
        return {name: _wide(each) for name, each in value.items()}
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def _scale(policy: Weights, reference: Weights) -> float:
    """A power of two that makes the direction comparable with the weights; 1 for equal models."""
    apart = sum(float((policy[name] - reference[name]).square().sum()) for name in reference)
    whole = sum(float(value.square().sum()) for value in reference.values())
    if apart == 0:
        return 1.0
    return 2.0 ** math.floor(math.log2(LARGEST_SHARE * math.sqrt(whole / apart)))
