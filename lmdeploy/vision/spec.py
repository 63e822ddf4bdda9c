"""`VisionSpec`: what config.json says of the eyes of a vision-language model, typed and frozen; None for a model that reads text only.

Both sides read it: the text side to know how many tokens a picture takes, the engine to build the tower. Layouts: LLaVA's own
(one flat config, the tower named by `mm_vision_tower`), LLaVA of transformers, InternVL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmdeploy.errors import CheckpointError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: towers that LLaVA's own layout names without describing them
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    f"openai/clip-vit-large-patch14{suffix}": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "image_size": size, "patch_size": 14,
    }
    for suffix, size in (("", 224), ("-336", 336))
}  # fmt: skip
MAX_TILES = 64

Aspect = Literal["pad", "anyres", "crop", "tiles"]


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """A vision transformer: [image_size / patch_size]^2 patches and a class token."""

    kind: Literal["clip", "intern_vit"]
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    norm_eps: float
    activation: str = "quick_gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    rms_norm: bool = False

    @property
    def side(self) -> int:
        """Patches across a picture."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """Tower, which of its layers is read, how pictures are cut into tiles of image_size x image_size pixels, and how features become tokens."""

    family: Literal["llava", "internvl"]
    tower: TowerSpec
    aspect: Aspect
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    feature_layer: int = -2  # negative: -1 is after the last layer
    pinpoints: tuple[tuple[int, int], ...] = ()  # anyres: (width, height) of canvases
    min_tiles: int = 1  # tiles
    max_tiles: int = 1
    thumbnail: bool = False
    downsample: float = 1.0  # internvl: pixel shuffle
    swap_axes: bool = False  # internvl: ps_version v2
    tower_name: str | None = None  # where the tower's weights are when the folder has none

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile."""
        return int(self.tower.side * self.downsample) ** 2

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest picture."""
        if self.aspect == "anyres":
            size = self.tower.image_size
            return 1 + max((w // size) * (h // size) for w, h in self.pinpoints)
        return self.max_tiles + (1 if self.thumbnail and self.max_tiles > 1 else 0)


def load_vision_spec(folder: Path) -> VisionSpec | None:
    """The vision part of a model folder, None when it has none. Raises CheckpointError for one that this version cannot read."""
    raw, processor = _table(folder / "config.json"), _table(folder / "preprocessor_config.json")
    if "mm_vision_tower" in raw:
        return _llava(raw, processor, folder)
    tower = raw.get("vision_config")
    if not isinstance(tower, Mapping):
        return None
    kind = str(raw.get("model_type", ""))
    if kind == "internvl_chat":
        return _internvl(raw, tower)
    if kind in ("llava", "llava_next"):
        return _llava_hf(raw, tower, processor, kind)
    raise CheckpointError(f"{folder}: pictures of model_type {kind!r} are not read yet; known: internvl_chat, llava, llava_next")


def _llava(raw: Mapping[str, Any], processor: Mapping[str, Any], folder: Path) -> VisionSpec:
    """LLaVA's own layout. The tower is described by a known name, or by a folder (relative to the model's) with a config.json."""
    name = str(raw["mm_vision_tower"])
    described = _table(folder / name / "config.json")
    facts = described.get("vision_config", described) or KNOWN_TOWERS.get(name)
    if not isinstance(facts, Mapping):
        raise CheckpointError(f"{folder}: mm_vision_tower={name[:100]!r} is neither a known tower ({', '.join(KNOWN_TOWERS)}) nor a folder with a config.json")
    _only(raw, folder, "mm_projector_type", ("mlp2x_gelu",))
    _only(raw, folder, "mm_vision_select_feature", ("patch",))
    aspect = str(raw.get("image_aspect_ratio") or "crop")
    aspects: dict[str, Aspect] = {"pad": "pad", "anyres": "anyres", "square": "crop", "crop": "crop"}
    if aspect not in aspects:
        raise CheckpointError(f"{folder}: image_aspect_ratio={aspect!r} is not read yet; known: {', '.join(aspects)}")
    if aspect == "anyres":
        _only(raw, folder, "mm_patch_merge_type", ("spatial_unpad",))
    return VisionSpec(
        "llava",
        _tower(facts, "clip"),
        aspects[aspect],
        *_colours(processor, CLIP_MEAN, CLIP_STD),
        feature_layer=int(raw.get("mm_vision_select_layer", -2)),
        pinpoints=_pinpoints(raw, aspect == "anyres", folder, height_first=False),
        tower_name=name,
    )


def _llava_hf(raw: Mapping[str, Any], tower: Mapping[str, Any], processor: Mapping[str, Any], kind: str) -> VisionSpec:
    """LLaVA as transformers has it; its grid is (height, width)."""
    where = Path(str(raw.get("_name_or_path") or kind))
    _only(raw, where, "vision_feature_select_strategy", ("default",))
    _only(tower, where, "model_type", ("clip_vision_model",))
    layer = raw.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or layer >= 0:
        raise CheckpointError(f"config.json: vision_feature_layer={layer!r} is not read yet; a negative number is")
    anyres = kind == "llava_next"
    return VisionSpec(
        "llava",
        _tower(tower, "clip"),
        "anyres" if anyres else "crop",
        *_colours(processor, CLIP_MEAN, CLIP_STD),
        feature_layer=layer,
        pinpoints=_pinpoints(raw, anyres, where, height_first=True),
    )


def _internvl(raw: Mapping[str, Any], tower: Mapping[str, Any]) -> VisionSpec:
    dynamic = bool(raw.get("dynamic_image_size", True))
    size = raw.get("force_image_size") or tower.get("image_size")
    most = int(raw.get("max_dynamic_patch", 12)) if dynamic else 1
    least = int(raw.get("min_dynamic_patch", 1)) if dynamic else 1
    if not 1 <= least <= most <= MAX_TILES:
        raise CheckpointError(f"config.json: min_dynamic_patch={least} and max_dynamic_patch={most} must be in [1, {MAX_TILES}]")
    return VisionSpec(
        "internvl",
        _tower({**tower, "image_size": size}, "intern_vit"),
        "tiles",
        IMAGENET_MEAN,
        IMAGENET_STD,
        feature_layer=int(raw.get("select_layer", -1)),
        min_tiles=least,
        max_tiles=most,
        thumbnail=bool(raw.get("use_thumbnail", True)),
        downsample=float(raw.get("downsample_ratio", 0.5)),
        swap_axes=raw.get("ps_version", "v2") != "v1",
    )


def _tower(facts: Mapping[str, Any], kind: Literal["clip", "intern_vit"]) -> TowerSpec:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    numbers = [facts.get(name) for name in names]
    for name, value in zip(names, numbers, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 16:
            raise CheckpointError(f"config.json: {name}={value!r} of the vision tower must be a whole number in [1, 65536]")
    width, layers, heads, inner, size, patch = (int(n) for n in numbers if n is not None)
    if width % heads or size % patch:
        raise CheckpointError(
            f"config.json: the vision tower's hidden_size={width} must be a multiple of its {heads} heads, image_size={size} of patch_size={patch}"
        )
    clip = kind == "clip"
    return TowerSpec(
        kind,
        width,
        layers,
        heads,
        inner,
        size,
        patch,
        float(facts.get("layer_norm_eps", 1e-5 if clip else 1e-6)),
        str(facts.get("hidden_act", "quick_gelu" if clip else "gelu")),
        qkv_bias=clip or bool(facts.get("qkv_bias", True)),
        qk_norm=not clip and bool(facts.get("qk_normalization", False)),
        rms_norm=not clip and facts.get("norm_type") == "rms_norm",
    )


def _pinpoints(raw: Mapping[str, Any], wanted: bool, where: Path, *, height_first: bool) -> tuple[tuple[int, int], ...]:
    if not wanted:
        return ()
    found = raw.get("image_grid_pinpoints") or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    try:
        pairs = [(int(b), int(a)) if height_first else (int(a), int(b)) for a, b in found]
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{where}: image_grid_pinpoints must be pairs of numbers") from e
    if not pairs or len(pairs) > MAX_TILES or not all(1 <= side <= 1 << 14 for pair in pairs for side in pair):
        raise CheckpointError(f"{where}: image_grid_pinpoints must be 1 to {MAX_TILES} pairs of sizes in [1, 16384]")
    return tuple(pairs)


def _colours(processor: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Any, Any]:
    """Mean and deviation from preprocessor_config.json where it has them."""
    out = []
    for key, default in (("image_mean", mean), ("image_std", std)):
        value = processor.get(key, default)
        good = isinstance(value, (list, tuple)) and len(value) == 3 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
        if not good or (key == "image_std" and min(value) <= 0):
            raise CheckpointError(f"preprocessor_config.json: {key}={str(value)[:80]} must be three numbers")
        out.append(tuple(float(v) for v in value))
    return out[0], out[1]


def _only(raw: Mapping[str, Any], where: Path, key: str, known: tuple[str, ...]) -> None:
    value = raw.get(key, known[0])
    if value not in known:
        raise CheckpointError(f"{where}: {key}={str(value)[:60]!r} is not read yet; known: {', '.join(known)}")


def _table(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file. `spec.py` complains about a broken config.json."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
