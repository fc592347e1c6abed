"""One seed per item (run, stage, iteration, prompt, candidate), so that order and batches do not matter."""

from __future__ import annotations

from hashlib import blake2b


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2**32) that depends on every part and its type.

    32 bits, because torch's CPU generator uses no more; a seed of ours, given to
    `torch.Generator().manual_seed`, therefore reproduces an image in plain diffusers.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")
