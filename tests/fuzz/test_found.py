"""Inputs that once ended in a traceback, as small as they get, and the error or result they end in now."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from stages.core.artifacts.provenance import ArtifactError, policy_digest
from stages.core.artifacts.schemas import PROMPTS
from stages.core.artifacts.tables import read_metadata, read_table, write_table
from stages.core.data.evaluation_prompts import read_evaluation_prompts
from stages.core.data.prompts import prompt_id, read_prompts
from stages.core.errors import UserError
from stages.core.export.preferences import read_pairs
from stages.core.plan.configuration import ConfigError, check_config, read_config
from stages.import_preferences import main
from tests.builders import encoded, human_row, picture, write_rows
from tests.label_files import WRITERS, args_for, some_pairs

ROOT = Path(__file__).resolve().parents[2]


def config() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    return values


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 3.0, "'seed' is 3.0 (float); expected integer"),
        ("seed", 10**400, "'seed' is a number of 1329 bits; at most 63 are taken"),
        ("iterations", 100, "'iterations' is 100: it is greater than the maximum of 99"),
        (
            "guards",
            {"max_drift": float("nan")},
            "'guards.max_drift' is nan (float); expected number",
        ),
        (
            "guards",
            {"max_drift": float("inf")},
            "'guards.max_drift' is inf (float); expected number",
        ),
        ("metrics", {1: 2, "a": 3}, "the key 1 in 'metrics': keys are texts"),
        ("metrics", {"a": {"b": nested(400)}}, "lies too deep"),
        ("metrics", {"a": {"b": [0] * 200_000}}, "at most 20 levels and 100,000 entries"),
        ("run", datetime.date(2026, 1, 1), "'run' is datetime.date(2026, 1, 1) (date); expected"),
        ("run", "x" * 5000, "it has 5,000 letters; at most 4,096 are taken"),
        ("run", ["x" * 4000] * 50, "'run' is ['xxx"),
    ],
)
def test_a_config_is_refused_in_a_few_words(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config({**config(), key: value})
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", "it is [1]; expected keys with values"),
        ("a", "it is 'a'; expected keys with values"),
        ("seed: " + "9" * 5000, "cannot be read as YAML: Exceeds the limit"),
        ("run: 2026-99-99", "cannot be read as YAML: month must be"),
        ("[" * 3000, "cannot be read as YAML: maximum recursion depth"),
        ("a: &a [*a]", "lies too deep"),
        ("run: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 19)),
         "at most 20 levels and 100,000 entries"),
    ],
)  # fmt: skip
def test_a_yaml_file_is_refused_in_a_few_words(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(ROOT / "config/config.yaml", tmp_path / "mine.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '["a", "half \\ud800"]', "the prompt in row 1 is no text: it holds U+D800"),
        ("a.json", "[" * 100_000, "is no readable JSON: maximum recursion depth"),
        ("a.json", "9" * 5000, "is no readable JSON: Exceeds the limit"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ' + "[" * 100_000, "row 1: the line is no readable JSON"),
        ("a.jsonl", '{"prompt": "a"}\n' + '{"b": ' + "[" * 50 + "]" * 50 + "}", "row 1: the row is nested deeper"),
    ],
)  # fmt: skip
def test_a_file_of_prompts_is_refused_with_its_row(
    name: str, content: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert words in str(caught.value)


def test_line_breaks_in_quoted_cells_are_kept_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt\r\n"one\r\ntwo\rthree\nfour"\r\n')
    assert read_prompts(tmp_path / "a.csv") == ["one\r\ntwo\rthree\nfour"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"Prompt": 5, "Category": "a", "Challenge": "b"}, "row 1: expected texts in Prompt"),
        ({"Prompt": "a"}, "row 1: expected texts in Prompt, Category, Challenge, found ['a', None"),
        ({"Prompt": "a", "Category": "\udfff", "Challenge": "b"}, "row 1: it holds U+DFFF"),
    ],
)
def test_a_row_of_partiprompts_without_its_texts_is_named(
    row: dict[str, object], words: str, tmp_path: Path
) -> None:
    good = {"Prompt": "a cat", "Category": "Animals", "Challenge": "Basic"}
    (tmp_path / "a.json").write_text(json.dumps([good, row]))
    with pytest.raises(UserError) as caught:
        read_evaluation_prompts([tmp_path / "a.json"], "partiprompts")
    assert words in str(caught.value)


def damaged_after_the_head(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[20:220] = bytes(200)
    path.write_bytes(bytes(content))
    return path


def test_a_damaged_page_of_parquet_is_told_with_the_files_name(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.parquet"
    rows = [{"prompt_id": prompt_id(text), "prompt": text} for text in ("a" * 90, "b" * 90)]
    write_table(prompts, rows, PROMPTS, stage="select_prompts", arguments={})
    damaged_after_the_head(prompts)
    for read in (read_prompts, lambda path: read_table(path, PROMPTS)):
        with pytest.raises(UserError, match=r"prompts.parquet is no readable Parquet file"):
            read(prompts)


def test_a_damaged_arrow_stream_is_told_and_does_not_end_the_process(tmp_path: Path) -> None:
    """Offsets of its own making once led pyarrow out of the file, and the process into a crash."""
    WRITERS["pairs-arrow"][1](tmp_path / "data", some_pairs())
    (path,) = (tmp_path / "data").glob("*.arrow")
    content = bytearray(path.read_bytes())
    place = content.index(some_pairs()[0][0].encode())  # the texts; their offsets come before
    content[place - 16 : place - 8] = b"\xff\xff\xff\x7f" * 2
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"arrow is no readable Arrow stream"):
        main(args_for(tmp_path / "data"))


def test_a_text_of_parquet_that_is_not_utf8_is_told_with_the_files_name(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    pq.write_table(pa.table({"prompt": texts, "prompt_id": texts}), tmp_path / "a.parquet")
    for read in (read_prompts, lambda path: read_table(path, PROMPTS)):
        with pytest.raises(UserError, match=r"a.parquet is no readable Parquet file"):
            read(tmp_path / "a.parquet")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    column = pa.array(["a"])
    table = pa.Table.from_arrays([column, column, column], ["prompt", "prompt_id", "prompt"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ArtifactError, match="has 2 columns 'prompt'"):
        read_table(tmp_path / "a.parquet", PROMPTS)
    with pytest.raises(ArtifactError, match="column 'prompt' is there twice"):
        list(read_pairs([tmp_path / "a.parquet"], None, ["prompt"]))


@pytest.mark.parametrize("files", [[[None, "a"]], ["ab"], 3, {"a": 3}])
def test_a_manifest_without_names_and_digests_is_none(files: object, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
    with pytest.raises(
        ArtifactError, match=r"manifest.json (is no readable manifest|lists 'a': 3)"
    ):
        policy_digest(tmp_path)


def test_metadata_that_is_not_utf8_is_shown_as_well_as_it_can_be(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.int64())], metadata={b"sail_stage": b"caf\xe9"})
    pq.write_table(pa.Table.from_pylist([], schema=schema), tmp_path / "a.parquet")
    assert read_metadata(tmp_path / "a.parquet")["stage"] == "caf\ufffd"


@pytest.mark.parametrize(
    ("kind", "old", "new", "words"),
    [
        ("rankings-jsonl", "[1, 2]", f"[1, {10**400}]", "row 0 (line 1): 'ranks' is 1000"),
        ("pairs-jsonl", "images/0-w.jpg", "a\\u0000b", "row 0 (line 1), column 'chosen': the image 'a\\x00b' cannot be read"),
        ("pairs-jsonl", "images/0-w.jpg", "x" * 5000, "row 0 (line 1), column 'chosen': the image 'xxx"),
        ("pairs-jsonl", '"images/0-w.jpg"', "[]", "row 0 (line 1), column 'chosen': the image has no bytes"),
        ("pairs-jsonl", '{"prompt": "', '{"prompt": "\\ud800', "row 0 (line 1): the caption is no text: it holds U+D800"),
    ],
)  # fmt: skip
def test_a_label_is_refused_with_its_row(
    kind: str, old: str, new: str, words: str, tmp_path: Path
) -> None:
    WRITERS[kind][1](tmp_path / "data", some_pairs())
    (path,) = (tmp_path / "data").glob("labels.*")
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        main(args_for(tmp_path / "data"))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_uid_that_is_a_list_is_a_name_as_well(tmp_path: Path) -> None:
    rows = [human_row(caption, image_0_uid=[caption], image_1_uid=[caption, "worse"])
            for caption, *_ in some_pairs(4)]  # fmt: skip
    write_rows(tmp_path / "data" / "train.parquet", rows)
    main(args_for(tmp_path / "data"))


@pytest.mark.parametrize("cut", [10, 700, 1400])
def test_a_tar_file_cut_off_or_compressed_and_cut_off_is_named(cut: int, tmp_path: Path) -> None:
    import gzip

    WRITERS["pairs-webdataset"][1](tmp_path / "data", some_pairs())
    (path,) = (tmp_path / "data").glob("*.tar")
    path.write_bytes(gzip.compress(path.read_bytes(), mtime=0)[:cut])
    with pytest.raises(UserError, match=path.name):
        main(args_for(tmp_path / "data"))


def test_an_image_whose_reader_stumbles_is_no_image(tmp_path: Path) -> None:
    data = encoded(picture(some_pairs(1)[0][0]), "PNG")
    rows = [human_row(caption) for caption, *_ in some_pairs(4)]
    rows[1]["jpg_0"] = data[:40] + b"\xff" * 10 + data[50:]
    path = write_rows(tmp_path / "data" / "train.parquet", rows)
    with pytest.raises(UserError, match=r"row 1, column 'jpg_0': the bytes are no readable image"):
        main(args_for(tmp_path / "data"))
    assert path.is_file()
