"""What is fuzzed: the code that reads what people bring, called as the rules and stages call it."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from stages import import_preferences
from stages.core.artifacts.images import decode_image, image_kind, preview_image
from stages.core.artifacts.provenance import policy_digest
from stages.core.artifacts.schemas import PREFERENCES, PROMPTS, SUMMARY
from stages.core.artifacts.tables import (
    num_rows,
    read_batches,
    read_metadata,
    read_table,
    write_table,
)
from stages.core.data.evaluation_prompts import read_evaluation_prompts
from stages.core.data.prompts import prompt_id, read_prompts
from stages.core.errors import UserError
from stages.core.export.preferences import count_pairs
from stages.core.plan.configuration import check_config, read_config
from tests.fuzz import models, verdicts
from tests.fuzz import strategies as some


@dataclass(frozen=True)
class Target:
    """A reader, and what is thrown at it."""

    name: str
    cases: st.SearchStrategy[Any]
    read: Callable[[Any, Path], object]
    """Reads a case, which it may write into an empty folder first. Raises UserError or returns."""


def _file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _config(case: dict[Any, Any], _folder: Path) -> object:
    return check_config(case)


def _yaml(case: bytes, folder: Path) -> object:
    return read_config(some.ROOT / "config" / "config.yaml", _file(folder, "mine.yaml", case))


def _prompts(case: tuple[str, bytes], folder: Path) -> object:
    return [prompt_id(text) for text in read_prompts(_file(folder, f"a.{case[0]}", case[1]))]


def _prompt_table(case: pa.Table, folder: Path) -> object:
    pq.write_table(case, folder / "a.parquet")
    return [prompt_id(text) for text in read_prompts(folder / "a.parquet")]


def _evaluation(case: tuple[str, tuple[str, bytes]], folder: Path) -> object:
    layout, (kind, content) = case
    prompts = read_evaluation_prompts([_file(folder, f"anime.{kind}", content)], layout)  # type: ignore[arg-type]
    return [prompt.prompt_id for prompt in prompts]


def _import(folder: Path, layout: str = "auto") -> object:
    """The whole stage, as the rule calls it, allowing two bad rows."""
    out = folder.parent / "out"
    import_preferences.main(
        import_preferences.Args(
            files=(folder,), num_pairs=None, num_holdout=1, seed=0, skip_bad=2, layout=layout,  # type: ignore[arg-type]
            preferences=out / "preferences.parquet", holdout=out / "holdout.parquet",
            summary=out / "import.json",
        )
    )  # fmt: skip
    return read_table(out / "preferences.parquet", PREFERENCES).to_pylist()


def _with_images(folder: Path) -> Path:
    (folder / "0.png").write_bytes(some.IMAGES[0])
    (folder / "1.jpg").write_bytes(some.IMAGES[1])
    (folder / "link.png").symlink_to("/etc/hostname")
    (folder / "loop.png").symlink_to("loop.png")
    return folder


def _label_table(case: tuple[str, pa.Table], folder: Path) -> object:
    kind, table = case
    if kind == "parquet":
        pq.write_table(table, _with_images(folder) / "labels.parquet", row_group_size=3)
    else:
        with pa.ipc.new_stream(_with_images(folder) / "labels.arrow", table.schema) as stream:
            stream.write_table(table)
    return _import(folder)


def _label_rows(case: tuple[str, bytes], folder: Path) -> object:
    _file(_with_images(folder), f"labels.{case[0]}", case[1])
    return _import(folder)


def _label_bytes(case: bytes, folder: Path) -> object:
    kind, content = ("arrow", case[1:]) if case[:1] == b"\x00" else ("parquet", case)
    _file(folder, f"labels.{kind}", content)
    return _import(folder)


def _label_files(case: Mapping[str, bytes], folder: Path) -> object:
    """A folder of images with captions beside them, by win/ and lose/ or by _w and _l."""
    for name, content in case.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return _import(folder)


def _label_archive(case: bytes, folder: Path) -> object:
    _file(folder, "labels.tar", case)
    return _import(folder)


def _images(case: bytes, _folder: Path) -> object:
    preview = preview_image(case)
    decoded = decode_image(case)
    assert decoded.size == (preview.width, preview.height)
    assert decoded.mode == "RGB"
    return image_kind(case, "a file")


def _artifact(case: bytes, folder: Path) -> object:
    path = _file(folder, "a.parquet", case)
    read_metadata(path)
    num_rows(path)
    list(read_batches(path, PROMPTS, size=2, rows=[0]))
    return read_table(path, PROMPTS).to_pylist()


def _other_artifact(case: pa.Table, folder: Path) -> object:
    pq.write_table(case, folder / "a.parquet")
    read_metadata(folder / "a.parquet")
    for schema in (PREFERENCES, SUMMARY):
        try:
            read_table(folder / "a.parquet", schema)
        except UserError:
            continue
    return count_pairs([folder / "a.parquet"], None)


def _manifest(case: bytes, folder: Path) -> object:
    _file(folder, "manifest.json", case)
    return policy_digest(folder)


def _table_bytes() -> st.SearchStrategy[bytes]:
    table = pa.table({"prompt": [f"prompt {n}" for n in range(6)],
                      "chosen": [some.IMAGES[n % 3] for n in range(6)],
                      "rejected": [some.IMAGES[3] for n in range(6)]})  # fmt: skip
    whole, stream = io.BytesIO(), io.BytesIO()
    pq.write_table(table, whole, row_group_size=3)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return some.damaged(st.sampled_from([whole.getvalue(), b"\x00" + stream.getvalue()]))


def _artifact_bytes() -> st.SearchStrategy[bytes]:
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"sail-fuzz-{os.getpid()}"
    rows = [{"prompt_id": prompt_id(text), "prompt": text} for text in ("a", "b", "c")]
    write_table(folder / "a.parquet", rows, PROMPTS, stage="select_prompts", arguments={"take": 3})
    content = (folder / "a.parquet").read_bytes()
    shutil.rmtree(folder)
    return some.damaged(st.just(content))


@st.composite
def _archives(draw: st.DrawFn) -> bytes:
    """A webdataset, its members sound or not, now and then damaged or compressed."""
    buffer = io.BytesIO()
    kind = draw(st.sampled_from(["w", "w", "w:gz", "w:bz2"]))
    with tarfile.open(fileobj=buffer, mode=kind) as archive:
        for number in range(draw(st.sampled_from([5, 4, 3, 0]))):
            members: dict[str, bytes] = {
                "chosen.png": some.IMAGES[0], "rejected.jpg": some.IMAGES[1],
                "json": json.dumps({"prompt": f"prompt {number}"}).encode(),
            }  # fmt: skip
            if draw(some.FATES) in (11, 12, 13):
                name = draw(
                    st.sampled_from([*members, "txt", "png", "json", "prompt.txt", "/../../x.png"])
                )
                members[name] = draw(st.one_of(some.IMAGE_FILES, some.JSON.map(lambda value: json.dumps(value).encode())))  # fmt: skip
            for name, content in members.items():
                entry = tarfile.TarInfo(f"{number:06d}.{name}")
                entry.size = len(content)
                if draw(some.FATES) == 11:
                    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(entry, io.BytesIO(content))
    content = buffer.getvalue()
    return draw(some.damaged(st.just(content))) if draw(some.FATES) in range(11, 20) else content


@st.composite
def _folders(draw: st.DrawFn) -> dict[str, bytes]:
    win, lose = draw(st.sampled_from([("win/{}", "lose/{}"), ("{}_w", "{}_l")]))
    names = st.text(st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1, max_size=8)  # fmt: skip
    found: dict[str, bytes] = {}
    for number in range(draw(st.sampled_from([5, 4, 3, 0]))):
        name = f"n{number}" if draw(some.FATES) not in (11, 12) else f"n{draw(names)}"
        for side in (win, lose):
            if draw(some.FATES) != 11:
                sound = st.sampled_from(some.IMAGES[:6])
                found[side.format(name) + ".png"] = draw(st.one_of(*[sound] * 9, some.IMAGE_FILES))
        if draw(some.FATES) != 11:
            text = draw(st.one_of(*[st.just(f"prompt {number}")] * 5, some.TEXTS))
            found[f"{name}.txt"] = text.encode(errors="surrogatepass")
    if draw(some.FATES) in range(11, 18):
        kind, content = draw(some.record_files(["prompts"]))
        found[f"prompts.{kind}"] = content
    return found


MANIFESTS = st.one_of(
    st.binary(max_size=30),
    some.JSON.map(lambda value: json.dumps(value).encode()),
    some.JSON.map(lambda value: json.dumps({"files": value}).encode()),
    st.dictionaries(some.NAMES.filter(bool), some.JSON, max_size=3).map(
        lambda files: json.dumps({"files": files}).encode()
    ),
)

LABELS = [name for name in some.LAYOUTS if name not in ("prompts", "artifact")]
TARGETS = (
    Target("config: values", some.configs(), _config),
    Target("config: YAML text", some.yaml_files(), _yaml),
    Target("prompts: text files", some.prompt_files(), _prompts),
    Target("prompts: Parquet", some.tables(["prompts", "prompts", "pickapic"]), _prompt_table),
    Target(
        "prompt sets: every layout",
        st.tuples(st.sampled_from(["plain", "partiprompts", "hpsv2"]), some.prompt_sets()),
        _evaluation,
    ),
    Target("labels: Parquet and Arrow rows",
           st.tuples(st.sampled_from(["parquet", "parquet", "arrow"]), some.tables(LABELS)), _label_table),
    Target("labels: CSV, TSV, JSON rows", some.record_files(LABELS), _label_rows),
    Target("labels: damaged Parquet and Arrow", _table_bytes(), _label_bytes),
    Target("labels: folders of images", _folders(), _label_files),
    Target("labels: webdatasets", _archives(), _label_archive),
    Target("labels: verdicts of known winners", verdicts.verdict_tables(), verdicts.import_table),
    Target("models: configs", models.model_configs(), models.load),
    Target("images", some.IMAGE_FILES, _images),
    Target("artifacts: damaged", _artifact_bytes(), _artifact),
    Target("artifacts: other tables", some.tables(["artifact", "artifact", "pairs"]), _other_artifact),
    Target("artifacts: manifests", MANIFESTS, _manifest),
)  # fmt: skip
