"""Small folders of images to label, and answers without a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stages.core.labelling.answers import Answer, Side
from stages.core.labelling.choosing import Chooser
from stages.core.labelling.desk import Desk
from stages.core.labelling.gallery import Gallery
from stages.core.labelling.pairs import choose_pairs
from stages.core.labelling.places import find_images
from stages.core.pages.journal import Journal
from tests.builders import CAPTIONS, encoded, picture

START = datetime(2026, 11, 1, tzinfo=UTC)


def write_images(folder: Path, num_prompts: int, num_images: int = 2) -> Path:
    """A folder for each prompt; image 0 is the sharpest."""
    for number, caption in enumerate(CAPTIONS[:num_prompts]):
        of_prompt = folder / f"prompt-{number:03d}"
        of_prompt.mkdir(parents=True)
        (of_prompt / "prompt.txt").write_text(caption + "\n", encoding="utf-8")
        for image in range(num_images):
            pixels = picture(caption, strength=1 - 0.1 * image, edge_width=1 + 2 * image)
            (of_prompt / f"{image}.png").write_bytes(encoded(pixels, "PNG"))
    return folder


@contextmanager
def open_desk(
    images: Sequence[Path],
    journal: Path,
    *,
    share: float = 0.1,
    per_prompt: int = 1,
    seed: int = 0,
    show: int = 2,
    chooser: Chooser | None = None,
) -> Iterator[Desk]:
    """A desk, as the stage makes it."""  # fmt: skip
    gallery = Gallery(find_images(images))
    pairs = choose_pairs(
        gallery.prompts, pairs_per_prompt=per_prompt, common_share=share, seed=seed,
        images_shown=show,
        are_chosen=chooser is not None,
    )  # fmt: skip
    with Journal(journal) as opened:
        yield Desk(gallery, pairs, opened, common_share=share, chooser=chooser)


def answer_all(desk: Desk, labeller: str, choice: str = "left", at_most: int = 10**6) -> list[str]:
    """Answer until nothing is left; the keys of the pairs in their order."""
    keys: list[str] = []
    while len(keys) < at_most and (shown := desk.current(labeller)) is not None:
        keys.append(shown.pair.key)
        assert desk.answer(labeller, shown.pair.key, choice)
    return keys


def answer(
    pair: str, labeller: str, choice: str, *, is_turned: bool = False, seconds: float = 0.0
) -> Answer:
    """An answer about a pair of which 'one' comes before 'two'."""
    sides = [Side(f"{pair}-1one", "1" * 32), Side(f"{pair}-2two", "2" * 32)]
    left, right = reversed(sides) if is_turned else sides
    return Answer(
        labeller, pair, "a kite", (left, right), choice, START + timedelta(seconds=seconds), False
    )
