"""`load_image`: a picture from a URL, a data: URL, a file or a PIL image, as an RGB PIL image.

Only pixel formats are decoded (no vector or document formats, which contain programs), the size is checked in the header before
pixels are, and only the first frame is read. Needs Pillow (the extra `vision`).
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy.errors import ConfigError
from lmdeploy.vision.fetch import fetch, too_large
from lmdeploy.vision.policy import OWN, MediaPolicy, refused

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def load_image(source: Any, policy: MediaPolicy = OWN) -> Image:
    """RGB image of a http(s) URL, a data: URL, a path or a PIL image. Raises RequestError when it is refused or no picture.

    Called without a policy, any local file may be read; URLs reach public hosts only, always.
    """
    pil = _pil()
    if isinstance(source, pil.Image):
        return _rgb(source)
    if not isinstance(source, (str, Path)):
        raise refused(f"a picture is a path, a URL or a PIL image, not {type(source).__name__}")
    return decode(_bytes_of(str(source), policy), policy)


def decode(data: bytes, policy: MediaPolicy) -> Image:
    """Pixels of the first frame. Raises RequestError for what is no picture, broken, or has too many pixels."""
    pil = _pil()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that we refuse below
            picture = pil.open(io.BytesIO(data), formats=FORMATS)
    except Exception as e:
        raise refused(f"the data is no picture of a known format ({', '.join(FORMATS)})") from e
    width, height = picture.size
    if width * height > policy.max_pixels:
        raise refused(f"the picture has {width} x {height} pixels; at most {policy.max_pixels} are accepted")
    try:
        return _rgb(picture)
    except Exception as e:  # decoders raise whatever they like on broken data
        raise refused(f"the picture is broken: {type(e).__name__}") from e


def _bytes_of(source: str, policy: MediaPolicy) -> bytes:
    kind = source[:8].lower()
    if kind.startswith("data:"):
        return _data_url(source, policy)
    if kind.startswith(("http://", "https://")):
        return fetch(source, policy)
    path = source.removeprefix("file://")
    if not policy.own_files:
        return _file(policy.resolve_path(path), policy)
    if "://" in path:
        raise refused(f"the picture's URL begins with {source[:20]!r}; only http, https and data: are fetched")
    return _file(Path(path).expanduser(), policy)


def _file(path: Path, policy: MediaPolicy) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(policy.max_bytes + 1) if regular else b""
    except (OSError, ValueError) as e:
        raise refused(f"the picture {str(path)[:200]!r} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if not regular:
        raise refused(f"the picture {str(path)[:200]!r} is no regular file")
    if len(data) > policy.max_bytes:
        raise too_large(len(data), policy)
    return data


def _open_at_once(path: str, flags: int) -> int:
    """A pipe without a writer would keep the thread for good."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _data_url(source: str, policy: MediaPolicy) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise refused("a data: URL must begin with data:image/TYPE;base64,")
    if len(body) * 3 // 4 > policy.max_bytes:
        raise too_large(len(body) * 3 // 4, policy)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as e:
        raise refused("the data: URL is not valid base64") from e


def _rgb(picture: Any) -> Image:
    converted: Image = picture.convert("RGB")
    return converted


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise ConfigError("pictures need the package pillow: pip install 'lmdeploy[vision]'") from e
    return Image
