"""`VisionEncoder`: a picture's tiles -> the rows that stand for its tokens in the decoder: tower, pixel shuffle or unpadding, projector.

It stands beside the decoder, which knows nothing of pictures but the rows that replace embeddings (`ForwardInputs.extra`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.errors import CheckpointError
from lmdeploy.messages import Picture
from lmdeploy.models.vision_tower import Linear, Norm, Weights, build_tower
from lmdeploy.vision.picture import unpadded
from lmdeploy.vision.spec import VisionSpec

Tensor = torch.Tensor

#: where towers are in the folders that we read: prefixes of the names below `embeddings` and `encoder`
TOWER_PREFIXES = (
    "vision_model.",  # InternVL
    "model.vision_tower.vision_tower.vision_model.",  # LLaVA's own
    "vision_tower.vision_model.",  # transformers
    "model.vision_tower.vision_model.",  # transformers 5
    "model.vision_tower.",
    "vision_tower.",
)
#: prefixes of the projector's two linear layers, and of `image_newline`
PROJECTORS = (
    ("model.mm_projector.0", "model.mm_projector.2", "model.image_newline"),
    ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2", "image_newline"),
    ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2", "model.image_newline"),
    ("mlp1.1", "mlp1.3", ""),
)
#: tensors of vision parts that need not be read: layers after the one whose features are used, and what follows them
UNREAD = ("*vision_model.*", "*vision_tower.*", "*.image_newline", "image_newline")


class VisionEncoder:
    """One vision part on one device. `batch`: tiles that pass the tower together."""

    def __init__(self, spec: VisionSpec, hidden_size: int, dtype: torch.dtype, device: torch.device, batch: int = 1) -> None:
        self.spec, self.hidden_size, self.dtype, self.device, self.batch = spec, hidden_size, dtype, device, batch
        self.tower = build_tower(spec.tower, spec.feature_layer, dtype, device)
        self.weights = Weights(dtype, device)
        self.newline: Tensor | None = None
        scale = 255.0 * torch.tensor(spec.std, device=device)
        self.scale, self.shift = (1.0 / scale).view(3, 1, 1), (-torch.tensor(spec.mean, device=device) * 255.0 / scale).view(3, 1, 1)

    def load(self, source: WeightSource, folder: Path) -> None:
        """Pull tower and projector; a tower that is not in the folder comes from where config.json says."""
        prefix = next((p for p in TOWER_PREFIXES if source.has(f"{p}embeddings.class_embedding")), None)
        if prefix is not None:
            self.tower.load(source, prefix)
        else:
            self._load_named_tower(folder)
        first, second, newline = next((p for p in PROJECTORS if source.has(f"{p[0]}.weight")), PROJECTORS[0])
        wide = self.spec.tower.hidden_size * int(1 / self.spec.downsample) ** 2
        self.norm = Norm(self.weights, source, "mlp1.0", wide, 1e-5) if self.spec.family == "internvl" else None
        self.first = Linear(self.weights, source, first, wide, self.hidden_size)
        self.second = Linear(self.weights, source, second, self.hidden_size, self.hidden_size)
        if self.spec.aspect == "anyres":
            self.newline = self.weights.take(source, newline, self.hidden_size)

    def _load_named_tower(self, folder: Path) -> None:
        name = self.spec.tower_name
        if name is None:
            raise CheckpointError(f"{folder}: config.json describes a vision tower, but the folder has no tensors of it")
        inside = folder / name
        tower = open_source(inside if inside.is_dir() else resolve_model(name))
        self.tower.load(tower, "vision_model.")
        tower.finish(ignore=("*",))

    def tensors(self) -> Iterator[Tensor]:
        """All weights."""
        yield from self.tower.tensors()
        yield from self.weights.tensors.values()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(t.nbytes for t in self.tensors())

    def warm_up(self) -> None:
        """One batch of tiles, so that what the tower needs is known before the KV pool is sized."""
        size = self.spec.tower.image_size
        self._features(torch.zeros(self.batch, size, size, 3, dtype=torch.uint8, device=self.device))

    @torch.inference_mode()
    def encode(self, picture: Picture) -> Tensor:
        """The picture's rows [count, M]."""
        shape = (picture.tiles, picture.size, picture.size, 3)
        pixels = torch.frombuffer(bytearray(picture.pixels), dtype=torch.uint8).view(shape).to(self.device)
        rows = torch.cat([self._features(part) for part in torch.split(pixels, self.batch)])  # [tiles, tokens of a tile, M]
        out = self._unpadded(rows, picture) if self.spec.aspect == "anyres" else rows.flatten(0, 1)
        assert out.shape[0] == picture.count, f"{out.shape[0]} rows for {picture.count} tokens"
        return out

    def _features(self, pixels: Tensor) -> Tensor:
        """uint8 [N, S, S, 3] -> [N, tokens of a tile, M]."""
        x = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift
        features = self.tower.forward(x.to(self.dtype))
        if self.norm is not None:
            features = self.norm(self._shuffled(features))
        return self.second(F.gelu(self.first(features)))

    def _shuffled(self, features: Tensor) -> Tensor:
        """[N, side^2, C] -> [N, (side/2)^2, 4 C]: neighbouring patches side by side (pixel shuffle; version 1 leaves the axes swapped)."""
        side, factor = self.spec.tower.side, int(1 / self.spec.downsample)
        x = features.reshape(-1, side // factor, factor, side // factor, factor, features.shape[-1])  # [N, rows, r, columns, c, C]
        x = x.permute(0, 1, 3, 2, 4, 5) if self.spec.swap_axes else x.permute(0, 3, 1, 2, 4, 5)
        return x.flatten(3).flatten(1, 2)

    def _unpadded(self, rows: Tensor, picture: Picture) -> Tensor:
        """LLaVA-1.6: the whole picture, then the canvas without its padding, a newline after each row."""
        assert self.newline is not None
        side, (across, down) = self.spec.tower.side, picture.grid
        canvas = rows[1:].view(down, across, side, side, -1).permute(0, 2, 1, 3, 4).reshape(down * side, across * side, -1)  # [H, W, M]
        top, bottom, left, right = unpadded(picture.original, across * side, down * side)
        canvas = canvas[top:bottom, left:right]
        newline = self.newline.expand(canvas.shape[0], 1, -1)
        return torch.cat((rows[0], torch.cat((canvas, newline), 1).flatten(0, 1)))
