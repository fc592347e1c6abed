"""A Diffusion-DPO training from pairs to a policy folder: loop, loss, optimizers, saved state. It may
import `policies`, `method`, `models`, `artifacts` and `execution`.
"""
