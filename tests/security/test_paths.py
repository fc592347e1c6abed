"""Nothing is written outside the folder that a flag names, and nothing read outside the data's own."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stages.core.artifacts.files import replacing
from stages.core.artifacts.provenance import ArtifactError, policy_digest
from stages.core.artifacts.schemas import PREFERENCES
from stages.core.artifacts.tables import write_table
from stages.core.errors import UserError
from stages.core.export.folders import export_folder
from stages.core.models.adapter import DiffusionModel
from stages.core.policies.saving import save_policy
from stages.export_policy import Args as PolicyArgs
from stages.export_policy import main as export_policy
from stages.export_preferences import Args as PreferencesArgs
from stages.export_preferences import main as export_preferences
from stages.import_preferences import main
from tests.builders import CAPTIONS, encoded, human_row, image_value, picture, settings, write_rows
from tests.conftest import perturbed
from tests.label_files import WRITERS, args_for, some_pairs

NAMES = [
    "../../pwned",
    "/tmp/pwned",
    "..",
    "a/../../pwned",
    "$(touch pwned)",
    "pwned\x00.png",
    "x" * 300,
    "\u202egnp.exe",
    "CON",
    "a\\..\\..\\pwned",
]


def snapshot(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["pickapic", "preference", "imagefolder", "webdataset"])
def test_hostile_ids_of_a_table_become_no_names_of_an_exports_files(
    kind: str, tmp_path: Path
) -> None:
    image = image_value(encoded(picture(CAPTIONS[0])))
    rows = [
        {
            "pair_id": name,
            "prompt_id": name,
            "prompt": name,
            "winner": image,
            "loser": image,
            "source": name if number % 2 else "human",
            "iteration": 0,
            "source_file": name,
            "source_row": number,
            "policy_digest": name,
        }
        for number, name in enumerate(NAMES)
    ]
    table = tmp_path / "in" / "preferences.parquet"
    write_table(table, rows, PREFERENCES, stage="mix_preferences", arguments={})
    before = snapshot(tmp_path)
    export_preferences(
        PreferencesArgs(preferences=(table,), format=kind, output=tmp_path / "out")  # type: ignore[arg-type]
    )
    made = snapshot(tmp_path) - before
    assert all(name == "out" or name.startswith("out/") for name in made)
    for path in (tmp_path / "out" / "data").rglob("*"):
        assert not path.is_symlink()
        assert path.name.replace(".", "").replace("-", "").isalnum()
        if path.suffix == ".tar":
            with tarfile.open(path) as archive:
                assert all(m.isfile() and m.name.split(".")[0].isdigit() for m in archive)
    metadata = tmp_path / "out" / "data" / "metadata.jsonl"
    if kind == "imagefolder":
        lines = [json.loads(line) for line in metadata.read_text().splitlines()]
        assert [line["prompt"] for line in lines] == NAMES


def test_the_members_of_a_webdataset_are_never_extracted(tmp_path: Path) -> None:
    data, other = encoded(picture(CAPTIONS[0])), encoded(picture(CAPTIONS[0], strength=0.5))
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "labels.tar", "w") as archive:
        for number in range(4):
            for name, content in (
                (f"../../pwned{number}.chosen.png", data),
                (f"../../pwned{number}.rejected.png", other),
                (f"../../pwned{number}.json", json.dumps({"prompt": CAPTIONS[number]}).encode()),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo("../../pwned9.chosen.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    before = snapshot(tmp_path)
    main(args_for(tmp_path / "data"))
    made = snapshot(tmp_path) - before
    assert made == {"out", "out/preferences.parquet", "out/holdout.parquet", "out/import.json"}
    assert not list(tmp_path.parent.glob("pwned*"))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/hostname",
        "x" * 5000,
        "a\x00b",
        "loop.png",
        "pipe.png",
        "images/../../secret.png",
        "outside.png",
        "/dev/zero",
    ],
)
def test_an_image_path_of_a_table_reads_only_its_own_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    rows = [human_row(caption) for caption, *_ in some_pairs(4)]
    for row in rows:
        row["jpg_0"] = {"bytes": row["jpg_0"], "path": None}
    rows[1]["jpg_0"] = {"bytes": None, "path": name}
    path = write_rows(folder / "train.parquet", rows)
    (tmp_path / "secret.png").write_bytes(encoded(picture(CAPTIONS[0])))
    (folder / "outside.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(
        UserError, match="leaves the data folder|cannot be read|does not exist"
    ) as caught:
        main(args_for(folder))
    assert f"{path}, row 1, column 'jpg_0'" in str(caught.value)


def test_a_caption_beside_an_image_is_no_link_to_another_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    WRITERS["folders"][1](folder, some_pairs(4))
    for table in folder.glob("prompts.*"):
        table.unlink()
    for number, (caption, *_) in enumerate(some_pairs(4)):
        (folder / f"{number}.txt").write_text(caption)
    secret = tmp_path / "secret.txt"
    secret.write_text("a password")
    (folder / "2.txt").unlink()
    (folder / "2.txt").symlink_to(secret)
    with pytest.raises(UserError, match=r"2.txt is a link that leaves the data folder"):
        main(args_for(folder))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "a\x00b"])
def test_a_manifest_lists_only_files_below_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {name: "0" * 64}}))
    with pytest.raises(ArtifactError, match="expected names of files below"):
        policy_digest(tmp_path)


@pytest.mark.parametrize(
    "name", ["../pwned", "/tmp/pwned", "", ".", "a/b", "$(touch pwned)", "-x", "a\nb"]
)
def test_an_exported_policy_is_called_by_a_files_name_only(
    name: str, tmp_path: Path, tiny_base: str, other_policy: Path
) -> None:
    with pytest.raises(UserError, match="--name is .*expected a file's name"):
        export_policy(policy_args(tiny_base, other_policy, tmp_path / "out", name=name))
    assert not (tmp_path / "out").exists()


def policy_args(base: str | Path, policy: Path, output: Path, **changes: object) -> PolicyArgs:
    args = PolicyArgs(
        policy=policy,
        model=settings(base),
        format="diffusers",
        dtype="float32",
        name="mine",
        output=output,
    )
    return replace(args, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["../pwned", "/tmp/pwned", "a/../../pwned", ".."])
def test_a_base_models_index_names_only_its_own_parts(
    part: str, tmp_path: Path, tiny_base: str, other_policy: Path
) -> None:
    base = tmp_path / "models" / "base"
    shutil.copytree(tiny_base, base)
    (tmp_path / "models" / "pwned").mkdir()
    (tmp_path / "models" / "pwned" / "config.json").write_text("{}")
    index = json.loads((base / "model_index.json").read_text())
    index[part] = ["transformers", "CLIPTextModel"]
    (base / "model_index.json").write_text(json.dumps(index))
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="model_index.json"):
        export_policy(policy_args(base, other_policy, tmp_path / "out" / "mine"))
    assert snapshot(tmp_path) - before <= {"out"}


def test_a_link_in_the_results_is_replaced_and_not_followed(
    tmp_path: Path, model: DiffusionModel
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    results = tmp_path / "results"
    (results / "policy").mkdir(parents=True)
    (results / "policy" / "unet").symlink_to(precious)
    (results / "table").symlink_to(precious / "file")
    with replacing(results / "table") as part:
        part.write_text("new")
    save_policy(perturbed(model), results / "policy", "unet")
    assert (precious / "file").read_text() == "mine"
    assert os.listdir(precious) == ["file"]
    assert not (results / "table").is_symlink()
    assert (results / "policy" / "unet" / "config.json").is_file()
    assert not (results / "policy" / "unet").is_symlink()
    (results / "export").symlink_to(precious)
    with (
        pytest.raises(UserError, match="a folder that no export wrote"),
        export_folder(results / "export"),
    ):
        pass
    assert (precious / "file").read_text() == "mine"


def test_a_training_state_is_read_as_tensors_only(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, ...]:
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"policy": Attack()}, tmp_path / "step.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "step.pt", weights_only=True)
    assert not (tmp_path / "pwned").exists()
