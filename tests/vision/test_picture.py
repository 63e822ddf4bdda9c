"""How pictures are cut: as the published processors do, which tokens they take, and that equal pictures are equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil

from lmdeploy.errors import CheckpointError
from lmdeploy.messages import Picture
from lmdeploy.vision.picture import best_canvas, cut, ratio_grid, unpadded
from lmdeploy.vision.spec import CLIP_MEAN, CLIP_STD, TowerSpec, VisionSpec, load_vision_spec

ROOT = Path(__file__).resolve().parents[3] / "shared"
CLIP = TowerSpec("clip", 1024, 24, 16, 4096, 336, 14, 1e-5)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SIZES = [(336, 336), (640, 480), (480, 640), (1000, 200), (50, 700), (17, 13), (672, 337)]


def picture(width: int, height: int) -> Image.Image:
    """Smooth noise."""
    noise = np.random.default_rng(width * height).integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def tiles_of(p: Picture) -> np.ndarray:
    """[tiles, S, S, 3]."""
    return np.frombuffer(p.pixels, dtype=np.uint8).reshape(p.tiles, p.size, p.size, 3)


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Normalised [..., 3, S, S] back to 0..255."""
    restored = values * np.array(CLIP_STD).reshape(3, 1, 1) + np.array(CLIP_MEAN).reshape(3, 1, 1)
    return np.moveaxis(restored * 255, -3, -1)


def llava(aspect: str, pinpoints: tuple[tuple[int, int], ...] = ()) -> VisionSpec:
    """LLaVA's facts."""
    return VisionSpec("llava", CLIP, aspect, CLIP_MEAN, CLIP_STD, pinpoints=pinpoints)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_the_plain_cut_is_that_of_clips_processor(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    theirs = as_bytes(np.asarray(processor(picture(*size))["pixel_values"][0]))
    assert np.abs(tiles_of(cut(picture(*size), llava("crop")))[0] - theirs).max() <= 1.01


@pytest.mark.parametrize("size", SIZES)
def test_anyres_tiles_are_those_of_llava_nexts_processor(size: tuple[int, int]) -> None:
    grid = [[h, w] for w, h in PINPOINTS]
    processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=grid)
    theirs = as_bytes(np.asarray(processor(picture(*size))["pixel_values"][0]))
    ours = cut(picture(*size), llava("anyres", PINPOINTS))
    assert ours.tiles == len(theirs)
    assert np.abs(tiles_of(ours) - theirs).mean() <= 0.5  # the canvas' place may differ by half a pixel


def test_padding_puts_the_picture_in_the_middle_of_the_mean_colour() -> None:
    tile = tiles_of(cut(Image.new("RGB", (200, 100), (255, 0, 0)), llava("pad")))[0]
    assert tuple(tile[168, 168]) == (255, 0, 0)
    assert tuple(tile[3, 168]) == tuple(int(channel * 255) for channel in CLIP_MEAN)


@pytest.mark.parametrize(
    "size, canvas", [((100, 100), (672, 672)), ((1000, 300), (1008, 336)), ((300, 1000), (336, 1008)), ((600, 300), (672, 336)), ((2000, 2000), (672, 672))]
)
def test_the_canvas_keeps_most_of_the_picture(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    chosen = best_canvas(size, PINPOINTS)
    kept = {c: min(int(size[0] * s) * int(size[1] * s), size[0] * size[1]) for c in PINPOINTS for s in [min(c[0] / size[0], c[1] / size[1])]}
    assert kept[chosen] == max(kept.values())
    if size != (100, 100):
        assert chosen == canvas


@pytest.mark.parametrize(
    "size, grid", [((448, 448), (1, 1)), ((900, 450), (2, 1)), ((448, 1344), (1, 3)), ((4000, 3000), (4, 3)), ((2000, 100), (12, 1)), ((1000, 1000), (3, 3))]
)
def test_internvl_takes_the_nearest_ratio(size: tuple[int, int], grid: tuple[int, int]) -> None:
    tower = TowerSpec("intern_vit", 1024, 24, 16, 4096, 448, 14, 1e-6)
    spec = VisionSpec("internvl", tower, "tiles", CLIP_MEAN, CLIP_STD, -1, max_tiles=12, thumbnail=True, downsample=0.5, swap_axes=True)
    assert ratio_grid(size, spec) == grid
    cut_up = cut(picture(*size), spec)
    tiles = grid[0] * grid[1]
    assert cut_up.tiles == tiles + (tiles > 1)
    assert cut_up.count == 256 * cut_up.tiles


def test_unpadded_features_have_the_pictures_ratio() -> None:
    assert unpadded((100, 100), 48, 48) == (0, 48, 0, 48)
    assert unpadded((200, 100), 48, 48) == (12, 36, 0, 48)
    assert unpadded((100, 200), 48, 48) == (0, 48, 12, 36)
    assert cut(picture(672, 336), llava("anyres", PINPOINTS)).count == 576 + 24 * 49


def test_equal_pictures_have_one_digest_and_others_do_not() -> None:
    spec = llava("anyres", PINPOINTS)
    first, same = cut(picture(640, 480), spec), cut(picture(640, 480), spec)
    changed = picture(640, 480)
    changed.putpixel((320, 240), (1, 2, 3))
    assert first.digest == same.digest
    assert (
        len(
            {
                first.digest,
                cut(changed, spec).digest,
                cut(picture(480, 640), spec).digest,
                cut(picture(640, 480), dataclasses.replace(spec, aspect="pad")).digest,
            }
        )
        == 4
    )


@pytest.mark.skipif(not ROOT.is_dir(), reason="shared/ is not beside the repository")
@pytest.mark.parametrize(
    "name, tiles, tile_tokens",
    [("llava-1.5-7b", 1, 576), ("llava-v1.6-vicuna-7b", 5, 576), ("InternVL2-2B", 13, 256), ("InternVL2-1B", 13, 256), ("InternVL2-26B", 13, 256)],
)
def test_published_configs_are_read(name: str, tiles: int, tile_tokens: int) -> None:
    spec = load_vision_spec(ROOT / "data" / "configs" / name)
    assert spec is not None
    assert (spec.most_tiles, spec.tile_tokens) == (tiles, tile_tokens)
    assert spec.tower.kind == ("clip" if "llava" in name else "intern_vit")


def test_a_text_model_has_no_eyes_and_unknown_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert load_vision_spec(tmp_path) is None
    (tmp_path / "config.json").write_text('{"model_type": "new_vl", "vision_config": {}}')
    with pytest.raises(CheckpointError, match="new_vl"):
        load_vision_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "some/tower"}')
    with pytest.raises(CheckpointError, match="some/tower"):
        load_vision_spec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "spiral"}')
    with pytest.raises(CheckpointError, match="spiral"):
        load_vision_spec(tmp_path)
