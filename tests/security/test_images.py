"""Images that are none, that lie about what they are, or that are bombs."""

from __future__ import annotations

import io
import re
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.core.artifacts.images import (
    MAX_PIXELS,
    ImageError,
    decode_image,
    image_kind,
    preview_image,
)
from stages.core.data.layouts import sources
from stages.core.errors import UserError
from stages.core.report.thumbnails import thumbnail
from stages.import_preferences import main
from tests.builders import encoded, human_row, picture, write_rows
from tests.label_files import WRITERS, args_for, some_pairs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG file whose header claims a size that its few bytes of pixels do not have."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    return png(64, 64, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)))


def gif(frames: int, size: int) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("P", (size, size), n % 7) for n in range(frames)]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def saved(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, kind, **options)
    return buffer.getvalue()


EPS = saved("EPS")
BOMBS = {
    "4 terapixels": (png(2_000_000, 2_000_000), "megapixels|too large"),
    "a row of 2**31 - 1": (png(2**31 - 1, 1), "megapixels|too large"),
    "just above the limit": (png(8192, 4097), "8192 x 4097 = 33.6 megapixels"),
    "a text that grows": (text_bomb(), "no readable image|too large"),
    "pixels cut off": (png(64, 64), "no readable image"),
    "no pixels": (png(0, 0), "no readable image"),
}
OTHERS = {
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "HTML": b"<html><body onload=alert(1)>",
    "PDF": saved("PDF"),
    "EPS": EPS,
    "TGA": saved("TGA"),
    "PCX": saved("PCX"),
    "ELF": b"\x7fELF" + bytes(60),
    "zip": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_no_time_and_no_memory(name: str) -> None:
    data, reason = BOMBS[name]
    assert len(data) < 400_000
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for decode in (decode_image, preview_image):
        with pytest.raises(ImageError, match=reason):
            decode(data)
    with pytest.raises(ImageError, match=f"rows.parquet, row 3.*({reason})"):
        thumbnail(data, "rows.parquet, row 3")
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_by_their_first_bytes_and_no_other_program_is_called(
    name: str,
) -> None:
    data = OTHERS[name]
    code = """if True:
        import sys
        from stages.core.artifacts.images import ImageError, decode_image
        def watch(event, args):
            assert not event.startswith(("subprocess", "os.exec", "os.system")), args
        sys.addaudithook(watch)
        try:
            decode_image(sys.stdin.buffer.read())
        except ImageError as error:
            print(error)
    """
    if name in ("EPS", "PDF"):  # what Pillow itself would give to Ghostscript
        done = subprocess.run(
            [sys.executable, "-c", code], input=data, capture_output=True, check=True
        )
        message = done.stdout.decode()
    else:
        with pytest.raises(ImageError) as caught:
            decode_image(data)
        message = str(caught.value)
    assert f"they begin with {data[:12]!r}; expected one of PNG, JPEG" in message


def test_of_many_frames_the_first_is_decoded() -> None:
    data = gif(200, 200)
    started = time.process_time()
    image = decode_image(data)
    assert image.size == (200, 200)
    assert time.process_time() - started < 1
    assert image_kind(data, "a file") == "gif"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_a_file_is_called_does_not_matter(kind: str, tmp_path: Path) -> None:
    """A PNG called .jpg is read as what it is, as browsers do."""
    folder = tmp_path / "data"
    pairs = some_pairs(4)
    WRITERS["pairs-csv"][1](folder, pairs)
    (folder / "images" / "0-w.jpg").write_bytes(encoded(picture(pairs[0][0]), kind))
    main(args_for(folder))


EXIF = {
    "a thumbnail that is a bomb": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x01\x02\x04\0\xff\xff\xff\xff\0\0\0\0",
    "an orientation of 99": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0c\0\0\0\0\0\0\0",
    "an orientation that is a text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0A\0\0\0\0\0\0\0",
    "a directory that points at itself": b"Exif\0\0II*\0\x08\0\0\0\x00\0\x08\0\0\0",
    "cut off": b"Exif\0\0II*\0",
}


@pytest.mark.parametrize("name", EXIF)
def test_an_odd_exif_block_is_passed_over(name: str) -> None:
    data = saved("JPEG", exif=EXIF[name])
    assert decode_image(data).size == (64, 64)
    assert preview_image(data).width == 64


@pytest.mark.parametrize("name", [*BOMBS, "SVG", "EPS"])
def test_an_import_names_file_and_row_of_each(name: str, tmp_path: Path) -> None:
    data = BOMBS[name][0] if name in BOMBS else OTHERS[name]
    rows = [human_row(caption) for caption, *_ in some_pairs(4)]
    rows[2]["jpg_1"] = data
    path = write_rows(tmp_path / "data" / "train.parquet", rows)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, row 2, column 'jpg_1': "):
        main(args_for(tmp_path / "data"))


def test_a_file_too_large_to_be_an_image_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 10_000)
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(20_000)
    assert sources.read_file(sources.Folder(tmp_path), "a.png") == (
        None,
        "'a.png' has 20,000 bytes; at most 10,000 are read",
    )
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        entry = tarfile.TarInfo("000.chosen.png")
        entry.size = 50_000_000
        archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    assert (tmp_path / "a.tar").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"a.tar: '000.chosen.png' has 50,000,000 bytes"):
        list(sources.read_rows(tmp_path / "a.tar", ["chosen"], with_images=True))


def test_the_limit_is_what_the_documentation_says() -> None:
    assert MAX_PIXELS == 8192 * 4096
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).size == (16, 16)
