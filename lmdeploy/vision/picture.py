"""A picture as the engine gets it: uint8 tiles, and how many tokens they become. Cutting and resizing follow each family's published processing.

Pixels travel as bytes and are scaled on the engine's device: a quarter of the size of floats, and the same for every precision.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

from lmdeploy.messages import Picture
from lmdeploy.vision.spec import VisionSpec

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int]  # width, height


def cut(image: Image, spec: VisionSpec) -> Picture:
    """Tiles of an RGB image; `start` is still 0."""
    canvas = best_canvas(image.size, spec.pinpoints) if spec.aspect == "anyres" else (0, 0)
    tiles = _tiles(image, spec, canvas)
    size = spec.tower.image_size
    pixels = b"".join(tile.tobytes() for tile in tiles)
    grid = (canvas[0] // size, canvas[1] // size) if spec.aspect == "anyres" else (1, 1)
    count = _anyres_tokens(image.size, grid, spec) if spec.aspect == "anyres" else len(tiles) * spec.tile_tokens
    digest = hashlib.sha256(f"{len(tiles)} {size} {grid} {image.size} ".encode() + pixels).hexdigest()
    return Picture(start=0, count=count, tiles=len(tiles), size=size, pixels=pixels, grid=grid, original=image.size, digest=digest)


def _tiles(image: Image, spec: VisionSpec, canvas: Size) -> list[Image]:
    size = spec.tower.image_size
    if spec.aspect == "tiles":
        return _ratio_tiles(image, spec)
    if spec.aspect == "anyres":
        return [image.resize((size, size), _bicubic()), *_grid(_padded(image, canvas), size)]
    if spec.aspect == "pad":
        return [_square(image, spec.mean).resize((size, size), _bicubic())]
    return [_centre(image, size)]


def _square(image: Image, mean: tuple[float, float, float]) -> Image:
    """In the middle of a square of the mean colour."""
    side = max(image.size)
    square = _new(side, side, tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _centre(image: Image, size: int) -> Image:
    """The shorter edge becomes `size`, the longer one is cut on both sides."""
    width, height = image.size
    short = min(width, height)
    scaled = (size, int(size * height / width)) if width == short else (int(size * width / height), size)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return image.resize(scaled, _bicubic()).crop((left, top, left + size, top + size))


def best_canvas(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The canvas that keeps most of the picture's pixels, and among those the one that wastes least."""
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(pinpoints, key=merit)


def _padded(image: Image, canvas: Size) -> Image:
    """As large as fits, in the middle of a black canvas."""
    across, down = canvas[0] / image.width, canvas[1] / image.height
    if across < down:
        scaled = (canvas[0], min(math.ceil(image.height * across), canvas[1]))
    else:
        scaled = (min(math.ceil(image.width * down), canvas[0]), canvas[1])
    black = _new(*canvas, (0, 0, 0))
    black.paste(image.resize(scaled, _bicubic()), ((canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2))
    return black


def _grid(image: Image, size: int) -> list[Image]:
    """Tiles, row by row."""
    return [image.crop((x, y, x + size, y + size)) for y in range(0, image.height, size) for x in range(0, image.width, size)]


def _ratio_tiles(image: Image, spec: VisionSpec) -> list[Image]:
    """InternVL: the grid of the nearest ratio, and a thumbnail when there are several tiles."""
    size = spec.tower.image_size
    across, down = ratio_grid(image.size, spec)
    tiles = _grid(image.resize((size * across, size * down), _bicubic()), size)
    return [*tiles, image.resize((size, size), _bicubic())] if spec.thumbnail and len(tiles) > 1 else tiles


def ratio_grid(size: Size, spec: VisionSpec) -> Size:
    """Tiles across and down whose ratio is nearest to the picture's; of equally near ones the larger where the picture has the pixels for it."""
    width, height = size
    grids = [(i, j) for i in range(1, spec.max_tiles + 1) for j in range(1, spec.max_tiles + 1) if spec.min_tiles <= i * j <= spec.max_tiles]
    best, distance = (1, 1), math.inf
    for i, j in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        off = abs(width / height - i / j)
        if off < distance or (off == distance and width * height > 0.5 * spec.tower.image_size**2 * i * j):
            best, distance = (i, j), off
    return best


def unpadded(original: Size, across: int, down: int) -> tuple[int, int, int, int]:
    """Of `across` x `down` features of a padded canvas those that show the picture: (top, bottom, left, right)."""
    width, height = original
    if width / height > across / down:
        margin = (down - int(round(height * across / width, 7))) // 2
        return margin, down - margin, 0, across
    margin = (across - int(round(width * down / height, 7))) // 2
    return 0, down, margin, across - margin


def _anyres_tokens(original: Size, grid: Size, spec: VisionSpec) -> int:
    """The whole picture, then each row of the unpadded features and a newline after it."""
    side = spec.tower.side
    top, bottom, left, right = unpadded(original, grid[0] * side, grid[1] * side)
    return side * side + (bottom - top) * (right - left + 1)


def _new(width: int, height: int, colour: Any) -> Image:
    from PIL import Image as pil

    return pil.new("RGB", (width, height), colour)


def _bicubic() -> Any:
    from PIL import Image as pil

    return pil.Resampling.BICUBIC
