"""Small random metrics in the published files' layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.metrics import official
from tests.tiny_models import tokenizer

PROMPTS = ["a red circle", "", "a red circle", "two dogs " * 40]
"""One twice, one empty, one too long for every metric."""


@dataclass(frozen=True)
class Published:
    """A folder with a small file of each metric, and the options that name it."""

    folder: Path

    def options(self, metric: str) -> dict[str, str]:
        """As the config would give them."""
        words = str(self.folder / "words")
        return {
            "pickscore": {"weights": str(self.folder / "pickscore"), "tokenizer": words},
            "clipscore": {"weights": str(self.folder / "clip")},
            "hpsv2": {"weights": str(self.folder / "HPS_v2_compressed.pt"), "tokenizer": words},
            "imagereward": {"weights": str(self.folder), "tokenizer": str(self.folder)},
            "aesthetics": {"weights": str(self.folder), "clip": str(self.folder / "clip")},
        }[metric]

    def weights_file(self, metric: str) -> Path:
        """The file that holds the metric's tensors."""
        return (
            self.folder
            / {
                "pickscore": "pickscore/pytorch_model.bin",
                "clipscore": "clip/pytorch_model.bin",
                "hpsv2": "HPS_v2_compressed.pt",
                "imagereward": "ImageReward.pt",
                "aesthetics": "sac+logos+ava1-l14-linearMSE.pth",
            }[metric]
        )


def publish(folder: Path) -> Published:
    """Write small files of all metrics."""
    num_words = len(tokenizer(folder / "words"))
    official.clip_folder(folder / "pickscore", activation="gelu", seed=1)
    official.clip_folder(folder / "clip", activation="quick_gelu", seed=2)
    hps = {"epoch": 1, "state_dict": official.open_clip(num_words)}
    torch.save(hps, folder / "HPS_v2_compressed.pt")
    num_pieces = official.bert_vocabulary(folder / "vocab.txt")
    torch.save(official.image_reward(num_pieces), folder / "ImageReward.pt")
    torch.save(official.head(48), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return Published(folder)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def pictures() -> NDArray[np.uint8]:
    """Four pictures with structure at every scale, wider than tall."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (4, 5, 6, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return np.clip(coarse + rng.normal(0, 20, coarse.shape), 0, 255).astype(np.uint8)
