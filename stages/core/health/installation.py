"""Whether the packages fit together and see the hardware."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from stages.core.health.findings import Finding

DISTRIBUTION = "sail-diffusion"
UPDATE = "pip install -e ."


def check_installation() -> Iterator[Finding]:
    """Python and torch, the pinned packages, and what tends to break."""
    yield from check_packages(DISTRIBUTION)
    yield from check_torch()
    yield from check_torchvision()
    if not _version("bitsandbytes"):
        yield Finding(level="note", what="bitsandbytes is not installed: no optimizer adamw8bit")


def check_packages(distribution: str) -> Iterator[Finding]:
    """Every requirement of a distribution that is missing or of another version."""
    try:
        requirements = [Requirement(text) for text in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        yield Finding(level="problem", what=f"{distribution} is not installed", remedy=UPDATE)
        return
    wrong = 0
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong += 1
            has = f"is {found}" if found else "is not installed"
            yield Finding(
                level="problem", what=f"{requirement.name} {has}, expected {requirement.specifier}",
                remedy=UPDATE,
            )  # fmt: skip
    if not wrong:
        yield Finding(level="ok", what=f"all {len(needed)} packages are of the versions pinned")


def check_torch() -> Iterator[Finding]:
    """Whether torch sees the GPUs that the driver shows."""
    import torch

    version = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield Finding(level="ok", what=f"{version}, {len(names)} GPUs: {', '.join(names)}")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            level="problem",
            what=f"{version}: there is an NVIDIA driver, and torch sees no GPU (a build of torch for "
            "the CPU, a driver too old for it, or an empty CUDA_VISIBLE_DEVICES)",
            remedy="pip install --force-reinstall torch",
        )
    else:
        yield Finding(level="ok", what=f"{version}, no GPU: everything runs on the CPU")


def check_torchvision() -> Iterator[Finding]:
    """A torchvision that belongs to another torch breaks the imports of transformers' image parts."""
    version = _version("torchvision")
    if version is None:
        return
    done = subprocess.run(
        [sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        yield Finding(
            level="problem",
            what=f"torchvision {version} does not fit torch ({' '.join(last)}); SAIL needs none",
            remedy="pip uninstall -y torchvision",
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
