"""Whether a metric's weights are there and fit, from their headers alone: before anything is spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from stages.core.errors import UserError
from stages.metrics import NETWORKS, SCORERS, aesthetics, clipscore, hpsv2, imagereward, pickscore
from stages.metrics.clip import read_clip
from stages.metrics.weights import Published, read_headers

Options = Mapping[str, str]
Found = Iterator[str]

CLIP_WORDS = ("vocab.json", "merges.txt")


def check_weights(metric: str, options: Options) -> str:
    """What was found, in words; a hub id is not fetched, and other packages' metrics not loaded.

    UserError, as scoring would raise it, for a file that is missing, that is no file of tensors, or
    whose tensors are not those of the published network, by name and shape.
    """
    if metric in SCORERS:
        return "needs no weights"
    if metric not in NETWORKS:
        return "is another package's; its weights are not checked"
    if "weights" not in options:
        raise UserError(
            f"metric {metric!r} needs metrics.{metric}.weights, a path or a hub id (docs/metrics.md)"
        )
    return "; ".join(CHECKS[metric](options))


def of_clip(metric: str, option: str, source: str, address: str, *, has_text: bool) -> Found:
    """A CLIP in transformers' layout."""
    published = Published(metric=metric, option=option, address=address)
    if published.is_remote(source):
        yield remote(option, source)
        return
    model, path = read_clip(source, published, has_text=has_text, read=read_headers)
    yield fits(path, sum(weight.numel() for weight in model.parameters()))


def of_words(metric: str, source: str, names: tuple[str, ...], address: str) -> Found:
    """A tokenizer's files."""
    words = Published(metric=metric, option="tokenizer", address=address)
    if words.is_remote(source):
        yield remote("tokenizer", source)
        return
    for name in names:
        words.beside(source, name)
    yield f"tokenizer at {source}"


def of_pickscore(options: Options) -> Found:
    """PickScore."""
    address = pickscore.ADDRESS
    yield from of_clip("pickscore", "weights", options["weights"], address, has_text=True)
    source = options.get("tokenizer", pickscore.TOKENIZER)
    yield from of_words("pickscore", source, CLIP_WORDS, address)


def of_clipscore(options: Options) -> Found:
    """CLIPScore."""
    address = clipscore.ADDRESS
    yield from of_clip("clipscore", "weights", options["weights"], address, has_text=True)
    source = options.get("tokenizer", options["weights"])
    yield from of_words("clipscore", source, CLIP_WORDS, address)


def of_hpsv2(options: Options) -> Found:
    """HPSv2."""
    values = {"version": "v2.0", **options}
    name = hpsv2.file_of(values)
    published = Published(metric="hpsv2", option="weights", address=hpsv2.ADDRESS)
    if published.is_remote(values["weights"]):
        yield remote("weights", values["weights"])
    else:
        path = published.find(values["weights"], [name])
        hpsv2.check_version(path, values["version"])
        model = hpsv2.read_open_clip(path, read_headers)
        yield fits(path, sum(weight.numel() for weight in model.parameters()))
    source = values.get("tokenizer", hpsv2.TOKENIZER)
    yield from of_words("hpsv2", source, CLIP_WORDS, hpsv2.ADDRESS)


def of_imagereward(options: Options) -> Found:
    """ImageReward."""
    published = Published(metric="imagereward", option="weights", address=imagereward.ADDRESS)
    if published.is_remote(options["weights"]):
        yield remote("weights", options["weights"])
    else:
        path = published.find(options["weights"], [imagereward.FILE])
        network = imagereward.read_network(path, read_headers)
        yield fits(path, sum(weight.numel() for weight in network.parameters()))
    source = options.get("tokenizer", imagereward.TOKENIZER)
    yield from of_words("imagereward", source, ("vocab.txt",), imagereward.ADDRESS)


def of_aesthetics(options: Options) -> Found:
    """LAION's head and the CLIP below it."""
    published = Published(metric="aesthetics", option="weights", address=aesthetics.ADDRESS)
    path = published.find(options["weights"], [aesthetics.FILE])
    head = aesthetics.read_head(path, read_headers)
    yield fits(path, sum(weight.numel() for weight in head.parameters()))
    clip = options.get("clip", aesthetics.CLIP)
    yield from of_clip("aesthetics", "clip", clip, aesthetics.ADDRESS, has_text=False)


CHECKS: Mapping[str, Callable[[Options], Found]] = {
    "pickscore": of_pickscore,
    "hpsv2": of_hpsv2,
    "imagereward": of_imagereward,
    "aesthetics": of_aesthetics,
    "clipscore": of_clipscore,
}


def remote(option: str, source: str) -> str:
    """In words, that a hub id was not looked at."""
    return f"{option} {source} is a hub id, fetched when it is first needed"


def fits(path: Path, parameters: int) -> str:
    """In words, that a file holds the network."""
    return f"{path} fits, {parameters:,} parameters"
