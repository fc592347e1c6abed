"""What is thrown at the readers: mostly right input with something wrong in it, and sheer noise."""

from __future__ import annotations

import copy
import csv
import datetime
import decimal
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from hypothesis import strategies as st
from PIL import Image

from stages.core.artifacts.schemas import PREFERENCES
from tests.security.hostile import FORMATS, PROMPTS, SHELL

ROOT = Path(__file__).resolve().parents[2]
Rows = list[dict[str, Any]]


def _loaded(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


CONFIGS = [_loaded(ROOT / "config" / f"{name}.yaml") for name in ("config", "sd15", "sdxl")]

TEXTS = st.one_of(
    st.sampled_from([*PROMPTS, *SHELL, *FORMATS]),
    st.text(max_size=30),
    st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=5),
)
NUMBERS = st.one_of(
    st.integers(-3, 3), st.integers(), st.sampled_from([2**31, 2**63, -(2**63), 10**400]),
    st.floats(), st.sampled_from([float("nan"), float("inf"), 0.5, -0.0, 1e308]),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=8),
    st.dates(), st.datetimes(datetime.datetime(1, 1, 2)),
)  # fmt: skip
KEYS = st.one_of(TEXTS, st.integers(), st.none(), st.booleans(), st.dates(), st.just(b"key"))
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=8,
)  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


def _deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all keys and list items, a few levels deep."""
    inner = {}
    if len(path) < 5 and isinstance(node, dict | list):
        inner = dict(node if isinstance(node, dict) else enumerate(node))
    return [
        path,
        *(place for key, value in inner.items() for place in _places(value, (*path, key))),
    ]


@st.composite
def configs(draw: st.DrawFn) -> dict[Any, Any]:
    """A config of the repository with a few values exchanged, removed or added."""
    config = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    values = st.one_of(
        JUNK, st.integers(5, 300).map(_deep), st.sampled_from(CONFIGS).map(copy.deepcopy)
    )
    for _ in range(draw(st.integers(0, 4))):
        *path, last = draw(st.sampled_from([place for place in _places(config) if place]))
        node: Any = config
        for key in path:
            node = node[key]
        action = draw(st.sampled_from(["exchange", "remove", "add"]))
        if action == "exchange":
            node[last] = draw(values)
        elif action == "remove":
            del node[last]
        elif isinstance(node, dict):
            node[draw(st.one_of(TEXTS, st.integers(), st.none()))] = draw(values)
    return config


YAML_JUNK = [
    "a: &a [*a]", "&b [*b, *b]", "run: !!python/object/apply:os.system ['touch pwned']", "- 1", "{",
    "seed: 0x" + "f" * 5000, "seed: " + "9" * 5000, "run: 2026-99-99", "? [a, b]\n: c", "<<: 1",
    "\t", "run: |\n  x\n y", "seed: .nan", "run: *nothing", "--- \n---", "seed: 1_000",
    "[" * 2000, "run: !!binary =", "run: !!set {a, b}", "seed: !!float x", "<<: {run: b}",
    "a: &x [1]\nb: &y [*x,*x,*x]\nc: &z [*y,*y,*y]\nd: [*z,*z,*z]",
]  # fmt: skip


@st.composite
def yaml_files(draw: st.DrawFn) -> bytes:
    """The text of a config with lines removed, doubled and exchanged; or bytes."""
    if draw(FATES) in (11, 12):
        return draw(st.binary(max_size=200))
    lines = yaml.safe_dump(draw(st.sampled_from(CONFIGS))).split("\n")
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(lines) - 1))
        junk = draw(st.one_of(st.sampled_from(YAML_JUNK), TEXTS))
        lines[place : place + draw(st.integers(0, 2))] = [junk]
    return "\n".join(lines).encode(errors="surrogatepass")


def _image(kind: str, size: tuple[int, int] = (20, 24), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


IMAGES = [
    _image("PNG"), _image("JPEG"), _image("WEBP"), _image("GIF"), _image("BMP"), _image("TIFF"),
    _image("PNG", mode="P"), _image("PNG", mode="RGBA"), _image("JPEG", mode="CMYK"),
    _image("TIFF", mode="I"), _image("TIFF", mode="F"), _image("PNG", (3, 300)),
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with some exchanged, cut off or added."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        action = draw(st.sampled_from(["exchange", "cut", "insert", "zero"]))
        if action == "cut":
            del data[place:]
        elif action == "zero":
            data[place : place + 4] = bytes(len(data[place : place + 4]))
        else:
            stop = place + 1 if action == "exchange" else place
            data[place:stop] = draw(st.binary(min_size=1, max_size=4))
    return bytes(data)


IMAGE_FILES = st.one_of(
    st.sampled_from(IMAGES),
    damaged(st.sampled_from(IMAGES)),
    st.binary(max_size=40),
    st.sampled_from([b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"]),
)  # fmt: skip

FATES = st.integers(0, 39)
"""Of a value, a column or a file: 11 and a few more are bad ones. Hypothesis likes the ends too well."""

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MAYBE_TEXT = st.one_of(st.none(), TEXTS.filter(lambda text: not _is_half(text)))
MAYBE_IMAGE = st.one_of(st.none(), IMAGE_FILES)
NAMES = st.one_of(
    st.sampled_from(["0.png", "1.jpg", "../x.png", "/etc/hostname", "x" * 5000, "a\x00b", ".", "", "images",
                     "loop.png", "link.png"]),
    MAYBE_TEXT,
)  # fmt: skip
CELLS = st.fixed_dictionaries({"bytes": MAYBE_IMAGE, "path": NAMES})
SECONDS = st.one_of(st.none(), st.integers(-(10**12), 10**12))  # more, and no Parquet file holds it
MOMENTS = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1))

KINDS: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): MAYBE_TEXT,
    pa.large_string(): MAYBE_TEXT,
    pa.dictionary(pa.int8(), pa.string()): MAYBE_TEXT,
    pa.binary(): MAYBE_IMAGE,
    STRUCT: st.one_of(st.none(), CELLS),
    pa.int64(): MOMENTS,
    pa.float64(): st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), st.floats()),
    pa.bool_(): st.one_of(st.none(), st.booleans()),
    pa.list_(pa.string()): st.one_of(st.none(), st.lists(NAMES, max_size=3)),
    pa.list_(pa.binary()): st.one_of(st.none(), st.lists(MAYBE_IMAGE, max_size=3)),
    pa.list_(STRUCT): st.one_of(st.none(), st.lists(CELLS, max_size=3)),
    pa.list_(pa.float32()): st.one_of(
        st.none(), st.lists(st.floats(width=32) | st.none(), max_size=3)
    ),
    pa.timestamp("ns"): MOMENTS,
    pa.timestamp("s", "Nowhere/Nothing"): SECONDS,
    pa.timestamp("us"): MOMENTS,
    pa.duration("ns"): MOMENTS,
    pa.date64(): st.one_of(st.none(), st.integers(-(10**9), 10**9).map(lambda n: n * 86_400_000)),
    pa.decimal128(20, 3): st.one_of(st.none(), st.just(decimal.Decimal("1.5"))),
    pa.map_(pa.string(), pa.int64()): st.one_of(st.none(), st.just([("a", 1)])),
    pa.null(): st.none(),
}
"""What columns may hold, whatever they are called."""

LAYOUTS: dict[str, dict[str, tuple[pa.DataType, ...]]] = {
    "pickapic": {
        "caption": (pa.string(),), "jpg_0": (pa.binary(), STRUCT), "jpg_1": (pa.binary(),),
        "label_0": (pa.float64(), pa.int64()), "label_1": (pa.float64(),),
        "has_label": (pa.bool_(),), "ranking_id": (pa.int64(),),
        "image_0_uid": (pa.string(),), "image_1_uid": (pa.string(),),
    },
    "pairs": {"prompt": (pa.string(),), "chosen": (STRUCT, pa.string()), "rejected": (STRUCT,)},
    "rankings": {"prompt": (pa.string(),), "images": (pa.list_(STRUCT), pa.list_(pa.string())),
                 "ranks": (pa.list_(pa.float32()),)},
    "rankings by image": {"prompt": (pa.string(),), "image": (STRUCT,), "rank": (pa.float64(),)},
    "likes": {"prompt": (pa.string(),), "liked": (pa.list_(STRUCT),), "disliked": (pa.list_(STRUCT),)},
    "likes by image": {"prompt": (pa.string(),), "image": (STRUCT,), "liked": (pa.bool_(), pa.float64())},
    "prompts": {"prompt": (pa.string(),), "category": (pa.string(),), "style": (pa.string(),)},
    "artifact": {field.name: (field.type,) for field in PREFERENCES.arrow},
}  # fmt: skip
"""Columns of each layout of labels, with types that they may well have."""

SOUND: dict[pa.DataType, Callable[[int], Any]] = {
    pa.string(): lambda n: f"prompt {n}",
    pa.binary(): lambda n: IMAGES[n % 3],
    STRUCT: lambda n: {"bytes": IMAGES[n % 3], "path": None},
    pa.int64(): lambda n: n % 2,
    pa.int32(): lambda n: n % 2,
    pa.float64(): lambda n: float(n % 2),
    pa.bool_(): lambda n: n % 2 == 0,
    pa.list_(STRUCT): lambda n: [{"bytes": IMAGES[n % 3], "path": None}, {"bytes": IMAGES[3], "path": None}],
    pa.list_(pa.string()): lambda n: ["0.png", "1.jpg"],
    pa.list_(pa.float32()): lambda n: [1.0, 2.0],
}  # fmt: skip
"""A value of each of these types that can be used."""


def _is_half(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _shift(name: str, kind: pa.DataType, place: int) -> int:
    """So that two columns of a row hold different images, and one of two labels is 1."""
    return place if kind in (STRUCT, pa.binary()) else int(name == "label_1")


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.int64()).cast(kind) if pa.types.is_duration(kind) else pa.array(values, kind)  # fmt: skip


@st.composite
def tables(draw: st.DrawFn, layouts: Sequence[str]) -> pa.Table:
    """A table of one of the layouts in which some columns, or some of their values, are others."""
    columns = LAYOUTS[draw(st.sampled_from(list(layouts)))]
    count = draw(st.sampled_from([5, 8, 3, 0, 2]))
    names, arrays = [], []
    for place, (name, kinds) in enumerate(columns.items()):
        fate = draw(FATES)
        if fate == 11:
            continue
        kind = draw(st.sampled_from(list(KINDS) if fate in (12, 13) else kinds))
        values = (
            [SOUND[kind](row + _shift(name, kind, place)) for row in range(count)]
            if kind in SOUND and fate != 14
            else None
        )
        if values is None:
            values = draw(st.lists(KINDS.get(kind, st.none()), min_size=count, max_size=count))
        elif count and fate in (15, 16, 17):
            values[draw(st.integers(0, count - 1))] = draw(KINDS.get(kind, st.none()))
        names += [draw(TEXTS.filter(lambda text: not _is_half(text))) if fate == 18 else name]
        arrays += [_array(values, kind)]
        if fate == 19:
            names, arrays = [*names, name], [*arrays, arrays[-1]]
    if not arrays:
        return pa.table({})
    table = pa.Table.from_arrays(arrays, names=names)
    return pa.concat_tables([table, table]) if draw(st.booleans()) else table


@st.composite
def records(draw: st.DrawFn, layouts: Sequence[str]) -> Rows:
    """Rows as people write them: images as paths, and now and then any value at all."""
    columns = LAYOUTS[draw(st.sampled_from(list(layouts)))]
    rows: Rows = []
    for number in range(draw(st.sampled_from([5, 8, 3, 0, 2]))):
        row: dict[str, Any] = {}
        for place, (name, kinds) in enumerate(columns.items()):
            fate = draw(FATES)
            if fate == 11:
                continue
            is_image, is_list = kinds[0] in (STRUCT, pa.binary()), pa.types.is_list(kinds[0])
            sound: Any = ("0.png", "1.jpg")[place % 2] if is_image else ["0.png", "1.jpg"] if is_list else SOUND[kinds[0]](number + (name == "label_1"))  # fmt: skip
            row[name] = draw(JSON) if fate in (12, 13) else draw(NAMES) if fate == 14 else sound
        rows.append(row)
    return rows


def as_table(rows: Rows, delimiter: str) -> bytes:
    """The rows under a head, as a spreadsheet saves them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO(newline="")
    cells = [names, *([row.get(name, "") for name in names] for row in rows)]
    if delimiter == "\t":  # which knows no quotes
        buffer.write("\n".join("\t".join(map(str, row)) for row in cells))
    else:
        csv.writer(buffer).writerows(cells)
    return buffer.getvalue().encode(errors="surrogatepass")


JSON_JUNK = [
    '{"prompt": ' + "[" * 100_000, "9" * 5000, '{"prompt": ' + "9" * 5000 + "}", "null", '"', "[]",
    '{"prompt": "\\ud800"}', '{"prompt": "a", "prompt": "b"}', "NaN", '{"prompt": ' + "[" * 50 + "]" * 50 + "}",
    '{"\\u0000problem": 1}',
]  # fmt: skip


@st.composite
def record_files(draw: st.DrawFn, layouts: Sequence[str]) -> tuple[str, bytes]:
    """(ending, content) of a text file of rows, sound or damaged."""
    rows, kind = draw(records(layouts)), draw(st.sampled_from(["csv", "tsv", "json", "jsonl"]))
    if kind in ("csv", "tsv"):
        content = as_table(rows, "," if kind == "csv" else "\t")
    else:
        lines = [json.dumps(row, default=str) for row in rows]
        if draw(FATES) in (11, 12, 13):
            lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(JSON_JUNK)))
        content = (f"[{','.join(lines)}]" if kind == "json" else "\n".join(lines)).encode()
    fate = draw(FATES)
    return kind, draw(damaged(st.just(content))) if fate in (11, 12) and content else content


@st.composite
def prompt_sets(draw: st.DrawFn) -> tuple[str, bytes]:
    """(ending, content) of an evaluation set, now and then with the columns of PartiPrompts."""
    kind, content = draw(st.one_of(prompt_files(), record_files(["prompts"])))
    renamed = content.replace(b"prompt", b"Prompt").replace(b"category", b"Category")
    return draw(st.sampled_from([(kind, content), (kind, renamed.replace(b"style", b"Challenge"))]))


@st.composite
def prompt_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """(ending, content) of a file of prompts."""
    kind = draw(st.sampled_from(["txt", "records", "noise"]))
    if kind == "records":
        return draw(record_files(["prompts", "prompts", "pairs"]))
    if kind == "txt":
        lines = draw(st.lists(TEXTS, max_size=6))
        return "txt", "\n".join(lines).encode(errors="surrogatepass")
    return draw(st.sampled_from(["txt", "csv", "json", "jsonl", "tsv", "parquet", "md"])), draw(
        st.binary(max_size=60)
    )
