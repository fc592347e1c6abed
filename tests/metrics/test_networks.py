"""Each network on small random weights in its published layout, against an independent forward."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from stages.core.artifacts.provenance import digest
from stages.core.errors import UserError
from stages.metrics import NETWORKS, load_scorer, score_in_batches
from stages.metrics.check import check_weights
from stages.metrics.clip import features
from stages.metrics.hpsv2 import read_open_clip
from stages.metrics.imagereward import read_network
from stages.metrics.preprocessing import clip_input, hpsv2_input, imagereward_input
from stages.metrics.weights import read_headers, read_tensors
from tests.metrics import independent
from tests.metrics.conftest import PROMPTS, Published
from tests.metrics.official import SIZE

TOLERANCE = 1e-5


def clip_tokens(prompts: list[str], num_words: int = 514) -> torch.Tensor:
    """Single characters by CLIP's byte table, in marks; by hand for the tests' vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {chr(code): number for number, code in enumerate(printable)}
    rows = []
    for prompt in prompts:
        words = prompt.lower().split()
        pieces = [
            letter[c] + (256 if i == len(w) - 1 else 0) for w in words for i, c in enumerate(w)
        ]
        row = [num_words - 2, *pieces[:75], num_words - 1]
        rows.append(row + [0] * (77 - len(row)))
    return torch.tensor(rows)


def bert_tokens(prompts: list[str], vocabulary: Path) -> tuple[torch.Tensor, torch.Tensor]:
    place = {word: number for number, word in enumerate(vocabulary.read_text().splitlines())}
    rows, masks = [], []
    for prompt in prompts:
        pieces = [c if i == 0 else f"##{c}" for w in prompt.split() for i, c in enumerate(w)]
        row = [place[piece] for piece in ["[CLS]", *pieces[:33], "[SEP]"]]
        rows.append(row + [0] * (35 - len(row)))
        masks.append([1] * len(row) + [0] * (35 - len(row)))
    return torch.tensor(rows), torch.tensor(masks)


def stacked(preprocess: Any, pictures: NDArray[np.uint8], **options: Any) -> torch.Tensor:
    return torch.stack([preprocess(picture, SIZE, **options) for picture in pictures])


def expected(published: Published, metric: str, pictures: NDArray[np.uint8]) -> tuple[Any, float]:
    """Scores by the independent forward, and the size of their unit in terms of a cosine."""
    stored = torch.load(published.weights_file(metric), weights_only=True)
    if metric == "imagereward":
        tokens = bert_tokens(PROMPTS, published.folder / "vocab.txt")
        raw = independent.raw_image_reward(stored, stacked(imagereward_input, pictures), *tokens)
        return (raw - 0.16717362830052426) / 1.0333394966054072, 1
    if metric == "hpsv2":
        weights, act = stored["state_dict"], independent.gelu
        pixels = stacked(hpsv2_input, pictures, antialias=True)
    else:
        act = independent.gelu if metric == "pickscore" else independent.quick_gelu
        name = "clipscore" if metric == "aesthetics" else metric
        clip = torch.load(published.weights_file(name), weights_only=True)
        weights, pixels = independent.as_open_clip(clip), stacked(clip_input, pictures)
    images = independent.clip_image(weights, pixels, act=act)
    if metric == "aesthetics":
        return independent.affine(stored, images), 1
    texts = independent.clip_text(weights, clip_tokens(PROMPTS), act=act)
    scale = {"pickscore": weights["logit_scale"].exp().item()}.get(metric, 100)
    cosine = (images * texts).sum(-1)
    return scale * (cosine.clamp(min=0) if metric == "clipscore" else cosine), scale


@pytest.mark.parametrize("metric", NETWORKS)
def test_a_network_equals_an_independent_forward(
    metric: str, published: Published, pictures: NDArray[np.uint8]
) -> None:
    scorer = load_scorer(metric, published.options(metric))
    found = scorer(images=pictures, prompts=PROMPTS)
    wanted, scale = expected(published, metric, pictures)
    assert found.dtype == np.float32
    assert np.abs(found - wanted.numpy()).max() < TOLERANCE * scale
    assert found.std() > 100 * TOLERANCE  # and pictures differ


@pytest.mark.parametrize("metric", NETWORKS)
def test_scores_do_not_depend_on_the_batch(
    metric: str, published: Published, pictures: NDArray[np.uint8]
) -> None:
    scorer = load_scorer(metric, published.options(metric))
    images = [*pictures, pictures[0][:, :31], pictures[1][:31]]  # of three sizes
    prompts = [*PROMPTS, "x", "y"]
    alone = score_in_batches(scorer, images, prompts, batch=1)
    assert score_in_batches(scorer, images, prompts, batch=3) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("metric", ["pickscore", "hpsv2", "clipscore"])
def test_a_prompt_goes_through_the_network_once(
    metric: str, published: Published, pictures: NDArray[np.uint8]
) -> None:
    scorer: Any = load_scorer(metric, published.options(metric))
    calls: list[int] = []
    encode = scorer.prompts.model.get_text_features
    scorer.prompts.model.get_text_features = lambda input_ids: (
        calls.append(len(input_ids)) or encode(input_ids=input_ids)
    )
    for _ in range(2):
        scorer(images=pictures, prompts=PROMPTS)
    assert calls == [3]


@pytest.mark.parametrize("metric", NETWORKS)
def test_the_spec_says_what_made_the_scores(metric: str, published: Published) -> None:
    spec: Any = load_scorer(metric, published.options(metric)).spec  # type: ignore[attr-defined]
    path = published.weights_file(metric)
    assert spec["weights"][path.name] == digest(path)
    assert spec["options"].items() >= published.options(metric).items()
    assert set(spec["versions"]) == {"torch", "transformers", "pillow"}
    assert spec["precision"] == "float32"


def damaged(published: Published, metric: str, folder: Path, change: Any) -> dict[str, str]:
    """Options that name a copy whose tensors `change` has been at."""
    shutil.copytree(published.folder, folder, dirs_exist_ok=True)
    copy = Published(folder)
    path = copy.weights_file(metric)
    stored = torch.load(path, weights_only=True)
    change(stored.get("state_dict", stored))
    torch.save(stored, path)
    return copy.options(metric)


INNER = {
    "pickscore": "vision_model.encoder.layers.1.self_attn.k_proj.weight",
    "clipscore": "text_model.encoder.layers.0.mlp.fc2.bias",
    "hpsv2": "visual.transformer.resblocks.1.attn.in_proj_weight",
    "imagereward": "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight",
    "aesthetics": "layers.4.weight",
}


@pytest.mark.parametrize("metric", NETWORKS)
def test_a_renamed_tensor_is_refused_by_name(
    metric: str, published: Published, tmp_path: Path
) -> None:
    name = INNER[metric]

    def rename(weights: dict[str, Any]) -> None:
        weights[f"module.{name}"] = weights.pop(name)

    options = damaged(published, metric, tmp_path, rename)
    with pytest.raises(UserError) as caught:
        load_scorer(metric, options)
    assert f"missing '{name}'" in str(caught.value)
    assert f"unexpected 'module.{name}'" in str(caught.value)


@pytest.mark.parametrize("metric", NETWORKS)
def test_a_missing_tensor_is_refused_by_name(
    metric: str, published: Published, tmp_path: Path
) -> None:
    name = INNER[metric]
    options = damaged(published, metric, tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=f"missing '{name}'; unexpected nothing"):
        load_scorer(metric, options)


@pytest.mark.parametrize("metric", NETWORKS)
def test_a_tensor_of_another_shape_is_refused_by_name(
    metric: str, published: Published, tmp_path: Path
) -> None:
    name = INNER[metric]

    def shorten(weights: dict[str, Any]) -> None:
        weights[name] = weights[name][:-1]

    with pytest.raises(UserError, match=f"tensor '{name}' has shape"):
        load_scorer(metric, damaged(published, metric, tmp_path, shorten))


@pytest.mark.parametrize("metric", NETWORKS)
def test_weights_that_are_not_there_are_asked_for(metric: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"needs metrics\.{metric}\.weights .* published at https"):
        load_scorer(metric, {})
    absent = str(tmp_path / "absent.pt")
    with pytest.raises(
        UserError, match=rf"metrics\.{metric}\.weights is .*absent.*Get it from http"
    ):
        load_scorer(
            metric,
            {"weights": absent, "tokenizer": absent}
            if metric not in ("aesthetics",)
            else {"weights": absent},
        )
    with pytest.raises(UserError, match=rf"no option 'wieghts' \(metrics\.{metric}\.wieghts"):
        load_scorer(metric, {"wieghts": absent})


def test_a_file_that_would_run_code_is_not_read(published: Published, tmp_path: Path) -> None:
    path = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": {"weight": Path("anything")}}, path)
    with pytest.raises(UserError, match="no file of plain tensors"):
        load_scorer("hpsv2", published.options("hpsv2") | {"weights": str(path)})


def test_hpsv2_keeps_its_versions_apart(published: Published, tmp_path: Path) -> None:
    options = published.options("hpsv2")
    with pytest.raises(UserError, match="the file of v2.0, but metrics.hpsv2.version is 'v2.1'"):
        load_scorer("hpsv2", options | {"version": "v2.1"})
    with pytest.raises(UserError, match="version is 'v3'; expected one of v2.0, v2.1"):
        load_scorer("hpsv2", options | {"version": "v3"})
    shutil.copy(published.weights_file("hpsv2"), tmp_path / "HPS_v2.1_compressed.pt")
    newer: Any = load_scorer("hpsv2", options | {"weights": str(tmp_path), "version": "v2.1"})
    assert newer.spec["options"]["version"] == "v2.1"


def test_hpsv2_antialiasing_is_an_option(published: Published, pictures: NDArray[np.uint8]) -> None:
    options = published.options("hpsv2")
    scores = [
        load_scorer("hpsv2", options | {"antialias": value})(images=pictures, prompts=PROMPTS)
        for value in ("True", "False")
    ]
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


def test_transformers_old_and_new_outputs_are_understood() -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    rows = torch.ones(2, 3)
    assert features(rows) is rows
    assert features(BaseModelOutputWithPooling(pooler_output=rows)) is rows


def test_a_tower_that_the_head_does_not_fit_is_refused(
    published: Published, tmp_path: Path
) -> None:
    from tests.metrics import official

    torch.save(official.head(768), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(UserError, match="embeddings of 768 numbers, but .* gives 48"):
        load_scorer("aesthetics", published.options("aesthetics") | {"weights": str(tmp_path)})


def without_last(weights: dict[str, torch.Tensor], prefix: str, layers: int) -> dict[str, Any]:
    """The weights with so many copies of layer 0 and no other, as tensors that hold one number."""
    kept = {name: value for name, value in weights.items() if not name.startswith(prefix)}
    first = {n: v for n, v in weights.items() if n.startswith(f"{prefix}0.")}
    copies = {
        f"{prefix}{number}.{name.removeprefix(f'{prefix}0.')}": value
        for number in range(layers)
        for name, value in first.items()
    }
    return kept | copies


def as_wide(weights: dict[str, Any], widths: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The weights with some tensors of the published size, which take no memory."""
    return weights | {name: torch.zeros(1).expand(shape) for name, shape in widths.items()}


@pytest.mark.parametrize(("vision", "text"), [(31, 24), (32, 23)])
def test_hpsv2s_file_without_its_last_layer_is_refused_by_name(
    vision: int, text: int, published: Published, tmp_path: Path
) -> None:
    stored = torch.load(published.weights_file("hpsv2"), weights_only=True)["state_dict"]
    weights = without_last(stored, "visual.transformer.resblocks.", vision)
    weights = without_last(weights, "transformer.resblocks.", text)
    weights = as_wide(
        weights,
        {
            "visual.conv1.weight": (1280, 3, 14, 14),
            "visual.positional_embedding": (257, 1280),
            "token_embedding.weight": (600, 1024),
            "positional_embedding": (77, 1024),
        },
    )
    path = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": weights}, path)
    gone = "visual.transformer.resblocks.31" if vision == 31 else "transformer.resblocks.23"
    for read in (read_tensors, read_headers):
        with pytest.raises(
            UserError, match=rf"missing '{gone}\.attn.*and 8 more; unexpected nothing"
        ):
            read_open_clip(path, read)


@pytest.mark.parametrize(("vision", "text"), [(23, 12), (24, 11)])
def test_imagerewards_file_without_its_last_layer_is_refused_by_name(
    vision: int, text: int, published: Published, tmp_path: Path
) -> None:
    stored = torch.load(published.weights_file("imagereward"), weights_only=True)
    weights = without_last(stored, "blip.visual_encoder.blocks.", vision)
    weights = without_last(weights, "blip.text_encoder.encoder.layer.", text)
    words = "blip.text_encoder.embeddings"
    weights = as_wide(
        weights,
        {
            "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
            f"{words}.word_embeddings.weight": (600, 768),
            f"{words}.position_embeddings.weight": (512, 768),
        },
    )
    path = tmp_path / "ImageReward.pt"
    torch.save(weights, path)
    gone = "visual_encoder.blocks.23" if vision == 23 else "text_encoder.encoder.layer.11"
    for read in (read_tensors, read_headers):
        with pytest.raises(UserError, match=rf"missing 'blip\.{gone}\..*unexpected nothing"):
            read_network(path, read)


@pytest.mark.parametrize("metric", NETWORKS)
def test_headers_alone_tell_what_loading_would(
    metric: str, published: Published, tmp_path: Path
) -> None:
    assert "fits" in check_weights(metric, published.options(metric))
    name = INNER[metric]
    options = damaged(published, metric, tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=f"missing '{name}'; unexpected nothing"):
        check_weights(metric, options)
    path = Published(tmp_path).weights_file(metric)
    path.write_bytes(path.read_bytes()[:1000])  # a download that broke off
    with pytest.raises(UserError, match="no file of plain tensors"):
        check_weights(metric, options)
    path.unlink()
    with pytest.raises(UserError, match=rf"metrics\.{metric}\.weights is .*Get it from http"):
        check_weights(metric, options)
    with pytest.raises(UserError, match=rf"needs metrics\.{metric}\.weights"):
        check_weights(metric, {})


def test_headers_of_a_safetensors_file(published: Published, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    stored = torch.load(published.weights_file("aesthetics"), weights_only=True)
    save_file(stored, tmp_path / "head.safetensors")
    found = read_headers(tmp_path / "head.safetensors")
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        n: tuple(t.shape) for n, t in stored.items()
    }
    assert {t.device.type for t in found.values()} == {"meta"}
