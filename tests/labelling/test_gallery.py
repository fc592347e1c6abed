"""Images to label, in every layout that docs/labelling.md shows, and what is said of bad ones."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.core.artifacts.images import ImageError
from stages.core.artifacts.schemas import CANDIDATES
from stages.core.artifacts.tables import write_table
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError
from stages.core.labelling.gallery import Gallery, digest_of_image
from stages.core.labelling.places import find_images
from tests.builders import CAPTIONS, encoded, image_value, picture
from tests.builders import write_rows as write_parquet
from tests.labelling.builders import write_images

KITE, FOX = "a red kite", "a fox, asleep"


def png(shade: int, size: int = 32) -> bytes:
    return encoded(np.full((size, size, 3), shade, np.uint8), "PNG")


def found(*sources: Path) -> dict[str, list[str]]:
    return {item.prompt: [place.name for place in item.places] for item in find_images(sources)}


def fill(folder: Path, **files: bytes | str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_a_folder_for_each_prompt(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 2, 3)
    assert found(folder) == {
        caption: [f"prompt-{number:03d}/{image}.png" for image in range(3)]
        for number, caption in enumerate(CAPTIONS[:2])
    }


def test_images_with_a_text_of_the_same_name(tmp_path: Path) -> None:
    for number, prompt in enumerate((KITE, FOX, "A  RED kite", FOX)):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        (tmp_path / f"{number}.txt").write_text(prompt)
    assert found(tmp_path) == {KITE: ["0.png", "2.png"], FOX: ["1.png", "3.png"]}


def write_table_of(tmp_path: Path, kind: str) -> Path:
    rows = [{"prompt": prompt, "image": f"images/{number}.png"}
            for number, prompt in enumerate((KITE, FOX, KITE))]  # fmt: skip
    for number in range(3):
        fill(tmp_path / "images", **{f"{number}_dot_png": png(40 * number)})
    path = tmp_path / f"table.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "image"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_parquet(
            path,
            [{**row, "image": image_value((tmp_path / row["image"]).read_bytes())} for row in rows],
        )
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_with_one_image_a_row(tmp_path: Path, kind: str) -> None:
    path = write_table_of(tmp_path, kind)
    assert found(path) == {KITE: [f"table.{kind}#0", f"table.{kind}#2"]}
    gallery = Gallery(find_images([path]))
    for name, shade in ((f"table.{kind}#0", 0), (f"table.{kind}#2", 80)):
        picture_of = gallery.picture(gallery.places[name])
        assert picture_of.data == png(shade)
        assert gallery.digests([name]) == {name: digest_of_image(png(shade))}
        assert gallery.find(picture_of.digest) == picture_of


def test_the_candidates_of_a_run_by_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "candidates"
    for shard in range(2):
        rows = [
            {"prompt_id": prompt_id(CAPTIONS[shard]), "prompt": CAPTIONS[shard], "candidate": n,
             "seed": n, "image": image_value(png(n)), "latents": [0.0]}
            for n in range(3)
        ]  # fmt: skip
        write_table(folder / f"shard-{shard}.parquet", rows, CANDIDATES,
                    stage="sample_candidates", arguments={})  # fmt: skip
    assert found(folder) == {
        CAPTIONS[shard]: [f"shard-{shard}.parquet#{n}" for n in range(3)] for shard in range(2)
    }


def test_kinds_that_browsers_do_not_show_alike_are_sent_as_png(tmp_path: Path) -> None:
    pixels = picture(CAPTIONS[0])
    for number, kind in enumerate(("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")):
        fill(tmp_path, **{f"{number}_dot_png": encoded(pixels, kind)})
    fill(tmp_path, prompt_dot_txt=KITE)
    gallery = Gallery(find_images([tmp_path]))
    pictures = [gallery.picture(place) for place in gallery.prompts[0].places]
    assert [found.media_type for found in pictures] == [
        "image/png", "image/jpeg", "image/webp", "image/png", "image/png", "image/png",
    ]  # fmt: skip
    with Image.open(io.BytesIO(pictures[3].data)) as image:
        assert image.format == "PNG"
        assert (np.asarray(image) == pixels).all()
    assert pictures[3].digest == digest_of_image((tmp_path / "3.png").read_bytes())


def test_images_are_forgotten_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.core.labelling.gallery.NUM_KEPT", 2)
    gallery = Gallery(find_images([write_images(tmp_path, 1, 4)]))
    pictures = [gallery.picture(place) for place in gallery.prompts[0].places]
    assert len(gallery._kept) == 2
    assert [gallery.find(item.digest) for item in pictures] == pictures
    assert gallery.find("0" * 32) is None


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "holds no images (found nothing); expected a folder for each prompt"),
        ({"notes_dot_md": "x"}, "holds no images (found 1 other files)"),
        ({"a_dot_png": png(1)}, "a.png\nare files without a prompt"),
        ({"k__a_dot_png": png(1), "k__b_dot_png": png(2), "k__prompt_dot_txt": " "},
         "k/prompt.txt: the caption is empty"),
        ({"k__a_dot_png": png(1), "k__prompt_dot_txt": KITE, "f__b_dot_png": png(2),
          "f__prompt_dot_txt": FOX}, "each of the 2 prompts has one image; a pair needs two"),
        ({"k__a_dot_png": png(1), "k__b_dot_png": b"no image", "k__prompt_dot_txt": KITE},
         "b.png\nare files that cannot be read as such"),
        ({"table_dot_csv": "prompt,file\nx,y\n"}, "has no column 'image' (found: prompt, file)"),
        ({"table_dot_csv": "text,image\n"}, "table.csv has no rows"),
        ({"table_dot_csv": "prompt,image\na kite,a.png\n,b.png\n"}, "row 1 (line 3): the caption is"),
        ({"table_dot_parquet": b"PAR1"}, "table.parquet is no readable Parquet file"),
    ],
)  # fmt: skip
def test_bad_input_is_named(tmp_path: Path, files: dict[str, bytes | str], said: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(UserError) as refused:
        find_images([fill(folder, **files)])
    assert said in str(refused.value)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"), [("nowhere", "does not exist"), ("notes.docx", "found '.docx'")]
)
def test_what_is_no_source_of_images_is_refused(tmp_path: Path, name: str, said: str) -> None:
    fill(tmp_path, notes_dot_docx="x")
    with pytest.raises(UserError, match=said):
        find_images([tmp_path / name])


def test_a_table_never_leads_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    fill(
        tmp_path / "data", table_dot_csv="prompt,image\na kite,../secret.png\na kite,missing.png\n"
    )
    gallery = Gallery(find_images([tmp_path / "data"]))
    for place, said in zip(
        gallery.prompts[0].places, ("leaves the data folder", "does not exist"), strict=True
    ):
        with pytest.raises(ImageError, match=rf"table.csv, row \d, column 'image': .*{said}"):
            gallery.picture(place)


def test_two_images_of_one_name_are_refused_because_answers_go_by_names(tmp_path: Path) -> None:
    one, other = (write_images(tmp_path / name, 1) for name in ("one", "other"))
    with pytest.raises(
        UserError, match=r"one/prompt-000/0.png and .*other/prompt-000/0.png are both"
    ):
        find_images([one, other])
    assert len(found(tmp_path)[CAPTIONS[0]]) == 4


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path, 1)
    fill(folder, **{"prompt-000__.cache_dot_png": b"x", ".trash__a_dot_png": b"x"})
    assert len(found(folder)[CAPTIONS[0]]) == 2
