"""Pictures from files, data: URLs and PIL: formats, limits before decoding, and no way out of the allowed folder."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from lmdeploy.errors import RequestError
from lmdeploy.vision.policy import MediaPolicy
from lmdeploy.vl import load_image


def picture(kind: str = "PNG", size: tuple[int, int] = (6, 4), mode: str = "RGB") -> bytes:
    """A small file of one colour."""
    out = io.BytesIO()
    Image.new(mode, size, 200).save(out, kind)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A valid PNG header of any size, with next to no data behind it."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def as_url(data: bytes, kind: str = "image/png") -> str:
    """A data: URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_becomes_rgb_from_a_file_and_from_a_data_url(kind: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(picture(kind))
    for source in (tmp_path / "p", str(tmp_path / "p"), f"file://{tmp_path}/p", as_url(picture(kind))):
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", (6, 4))


def test_pil_images_and_other_modes_are_converted() -> None:
    assert load_image(Image.new("RGBA", (2, 2))).mode == "RGB"
    assert load_image(as_url(picture(mode="P"))).mode == "RGB"


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "PDF", "EPS", "ICO"])
def test_formats_that_are_not_on_the_list_are_refused(kind: str) -> None:
    with pytest.raises(RequestError, match="no picture of a known format"):
        load_image(as_url(picture(kind, size=(16, 16))))


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 1), (1, 2**30)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="pixels|no picture"):
        load_image(as_url(bomb(*size)))


@pytest.mark.parametrize(
    "url, words",
    [
        (as_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "no picture"),
        (as_url(picture()[:40]), "broken|no picture"),
        ("data:text/html;base64,AAAA", "data:image"),
        ("data:image/png,AAAA", "data:image"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png;base64," + "A" * 4000, "at most 1000"),
    ],
)
def test_data_urls_that_are_no_picture_are_refused(url: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        load_image(url, MediaPolicy(max_bytes=1000))


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RequestError, match="at most"):
        load_image(tmp_path / "large")


def test_requests_read_no_files_unless_a_folder_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(picture())
    for source in (str(tmp_path / "p.png"), f"file://{tmp_path}/p.png"):
        with pytest.raises(RequestError, match="--allowed-media-path"):
            load_image(source, MediaPolicy())
        assert load_image(source, MediaPolicy(allowed_path=tmp_path)).size == (6, 4)
    assert load_image("p.png", MediaPolicy(allowed_path=tmp_path)).size == (6, 4)


def test_nothing_outside_the_allowed_folder_is_reached(tmp_path: Path) -> None:
    inside, outside = tmp_path / "media", tmp_path / "secret.png"
    inside.mkdir()
    (tmp_path / "media-too").mkdir()
    (tmp_path / "media-too" / "p.png").write_bytes(picture())
    outside.write_bytes(picture())
    (inside / "link.png").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    os.mkfifo(inside / "pipe")
    policy = MediaPolicy(allowed_path=inside)
    sources = (
        "../secret.png", str(outside), f"file://{outside}", "link.png", "loop", "pipe", ".", "x/../../secret.png", "a\0b", "../media-too/p.png", "/etc/passwd", "none",
    )  # fmt: skip
    for source in sources:
        with pytest.raises(RequestError, match="below the allowed media path") as caught:
            load_image(source, policy)
        assert str(tmp_path / "media") not in str(caught.value) or source.startswith(("/", "file:"))


@pytest.mark.parametrize("source", [5, None, b"x", ["a"]])
def test_other_types_are_named(source: object) -> None:
    with pytest.raises(RequestError, match=type(source).__name__):
        load_image(source)


def test_what_is_no_regular_file_is_refused_at_once_for_ones_own_program_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(RequestError, match="no regular file|cannot be read"):
            load_image(path)
