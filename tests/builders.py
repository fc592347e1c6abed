"""Small inputs that tests write: pictures of the embedded world and tables of human labels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stages.core.data.prompts import prompt_id
from stages.core.models.denoiser import LoraSettings
from stages.core.models.loading import ModelSettings
from stages.shapes.captions import all_scenes, parse_caption
from stages.shapes.renderer import Drawing, draw

CAPTIONS = [str(scene) for scene in all_scenes()[::37]]
"""39 captions of the embedded world, all different."""

Row = dict[str, Any]

FULL = LoraSettings(rank=0, alpha=16.0, target_modules=("to_q",))
"""A full fine-tune."""
LORA = LoraSettings(rank=4, alpha=8.0, target_modules=("to_q", "to_k", "to_v", "to_out.0"))
"""A small LoRA on the attention."""


def settings(base: str | Path, dtype: Any = "float32", **changes: Any) -> ModelSettings:
    """A model as the config names it."""
    return ModelSettings(base=str(base), dtype=dtype, **changes)


def picture(caption: str, *, strength: float = 1.0, edge_width: float = 1.0) -> np.ndarray:
    """8-bit pixels of the first scene that the caption allows, faded or blurred."""
    scene = parse_caption(caption).scenes()[0]
    drawing = Drawing(scene=scene, strength=strength, edge_width=edge_width)
    return (draw([drawing])[0] * 255).round().astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "JPEG") -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def image_value(data: bytes) -> Row:
    """An image as tables hold it."""
    return {"bytes": data, "path": None}


def human_row(caption: str, label: float | None = 1, **changes: object) -> Row:
    """A row in Pick-a-Pic columns; image 0 is the picture, image 1 a faded one."""
    row: Row = {
        "caption": caption,
        "jpg_0": encoded(picture(caption)),
        "jpg_1": encoded(picture(caption, strength=0.5, edge_width=6)),
        "label_0": label,
        "label_1": None if label is None else 1 - label,
        "has_label": True,
    }
    return {**row, **changes}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A Parquet file of the rows, with whatever columns they have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=4)
    return path


def prompt_row(prompt: str) -> Row:
    """A row of a prompts table."""
    return {"prompt_id": prompt_id(prompt), "prompt": prompt}


def read_rows(path: Path) -> list[Row]:
    """A table's rows, as plain pyarrow reads them."""
    rows: list[Row] = pq.read_table(path).to_pylist()
    return rows


def pixels_of(image: Row) -> np.ndarray:
    """Pixels of an image in a table."""
    return np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
