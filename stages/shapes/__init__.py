"""The embedded world: captions, a renderer, a known taste, and a tiny Stable Diffusion pipeline trained on them."""
