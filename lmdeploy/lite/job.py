"""`prepare`: everything that is decided before the first weight is read, and every check that needs no weights."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.checkpoint.writer import SHARD_BYTES, ShardWriter, left_state, partial_folder
from lmdeploy.config import EngineConfig
from lmdeploy.engine.memory import free_bytes
from lmdeploy.engine.start import choose_device, resolve_config
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.layers.build import BuildContext
from lmdeploy.lite.datasets import CalibrationText, Windows, cut_windows, load_text
from lmdeploy.lite.folder import check_room, check_work_dir
from lmdeploy.lite.method import Method
from lmdeploy.lite.options import LiteConfig
from lmdeploy.lite.plan import LayerPlan, plan_layers
from lmdeploy.log import get_logger
from lmdeploy.models.decoder import SmoothingGroup
from lmdeploy.models.language import Language, find_language
from lmdeploy.models.registry import model_class
from lmdeploy.parallel import Parallel
from lmdeploy.text.tokenizer import Tokenizer
from lmdeploy.version import __version__

logger = get_logger(__name__)

#: Options that change nothing in the layers that are written.
HARMLESS = ("work_dir", "overwrite", "resume", "eval_tokens", "download_dir", "revision")
#: Share of the device's free memory that hidden states may take; else they stay on the host.
HIDDEN_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    folder: Path
    language: Language
    config: LiteConfig
    method: Method
    device: torch.device
    dtype: torch.dtype
    text: CalibrationText
    windows: Windows
    groups: tuple[SmoothingGroup, ...]
    layers: tuple[LayerPlan, ...]

    @property
    def calibrates(self) -> bool:
        """False when weights are only rounded."""
        return self.windows.samples.shape[0] > 0

    @property
    def work_dir(self) -> Path:
        """The folder that is made."""
        return Path(self.config.work_dir).expanduser().resolve()

    @property
    def kept(self) -> list[str]:
        """Modules that stay as they are, by their names in the folder."""
        return [*self.language.others, *(self.language.stored(plan.prefix + name) for plan in self.layers for name in plan.kept)]

    def hidden_bytes(self) -> int:
        """Of all windows' hidden states."""
        return self.windows.samples.numel() * self.language.spec.hidden_size * self.dtype.itemsize if self.calibrates else 0

    def home(self) -> torch.device:
        """Where hidden states are kept: with the layers when they fit easily, else on the host."""
        fits = self.hidden_bytes() < HIDDEN_SHARE * free_bytes(self.device)
        return self.device if fits else torch.device("cpu")

    def memory_need(self, home: torch.device) -> dict[str, int]:
        """Bytes by kind of device: hidden states; the embedding, or one layer with what rounding it takes; on the host a shard."""
        spec = self.language.spec
        tokens = self.config.batch_size * self.windows.samples.shape[1]
        width = 3 * max(spec.intermediate_size, spec.hidden_size) + 4 * spec.hidden_size
        embedding = spec.vocab_size * spec.hidden_size * self.dtype.itemsize
        layer = max(2 * plan.num_weights * self.dtype.itemsize + self.method.work_bytes(plan.shapes) for plan in self.layers)
        need = {"cpu": min(SHARD_BYTES, embedding)}
        for kind, size in ((home.type, self.hidden_bytes()), (self.device.type, max(embedding, layer + tokens * width * 4))):
            need[kind] = need.get(kind, 0) + size
        return need

    def output_bytes(self) -> int:
        """About what the new folder will take, rather more than less: 4 bits save 73 % of linear weights, 8 bits half."""
        before = sum(p.stat().st_size for p in self.folder.iterdir() if p.is_file())
        return before - int((0.7 if self.method.packs else 0.45) * sum(plan.linear_bytes for plan in self.layers))

    def fingerprint(self) -> dict[str, Any]:
        """What a run must have in common with an interrupted one to continue it."""
        options = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in HARMLESS}
        files = sorted(p for p in self.folder.iterdir() if p.is_file())
        digest = hashlib.sha256(self.windows.samples.numpy().tobytes()).hexdigest()
        facts = {
            "lmdeploy": __version__,
            "torch": torch.__version__,
            "method": self.method.title(calibrated=self.calibrates),
            "device": str(self.device),
            "dtype": str(self.dtype),
        }
        model = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        return {**facts, "model": model, "calibration text": [digest], **options}


def prepare(model: str | None, config: LiteConfig, method: Method) -> Job:
    """All checks that need no weights; every mistake of the user's is found here."""
    folder = resolve_model(model, config.download_dir, config.revision)
    language = find_language(folder)
    spec = language.spec
    if spec.quantization is not None:
        name = spec.quantization.get("quant_method", "unknown")
        raise CheckpointError(f"{folder}: is already quantised (quant_method={name}); give the 16-bit model")
    work_dir = Path(config.work_dir).expanduser()
    check_work_dir(folder, work_dir, overwrite=config.overwrite)
    engine = EngineConfig(dtype=config.dtype, device_type=config.device)
    device = choose_device(engine)
    dtype: torch.dtype = getattr(torch, resolve_config(engine, spec, device).dtype)
    skeleton = model_class(spec)(BuildContext(spec, Parallel(), REFERENCE, dtype, torch.device("meta")))
    layers = plan_layers(skeleton, language.open(folder), method.group, packs=method.packs)
    text = load_text(config.calib_dataset, config.download_dir)
    seqlen = min(config.calib_seqlen, spec.max_position)
    windows = cut_windows(Tokenizer(folder).encode(text.text), config.calib_samples, seqlen, config.eval_tokens)
    return Job(folder, language, config, method, device, dtype, text, windows, skeleton.smoothing_groups(), layers)


def open_writer(job: Job, needed: int = 0) -> ShardWriter:
    """The partial folder of a run: new, or taken up; `needed` bytes must be free. ConfigError when what is there belongs to another run, or would be lost."""
    state = {"run": job.fingerprint(), "kept on purpose": job.config.resume}
    left = left_state(job.work_dir)
    if left is not None:
        _check_left(job, left, state["run"])
    elif job.config.resume:
        logger.info("there is no interrupted run at %s; starting afresh", partial_folder(job.work_dir))
    check_room(job.work_dir, needed + min(SHARD_BYTES, needed))  # while parts are joined to shards, one of them is there twice
    return ShardWriter(job.work_dir, state=state, resume=job.config.resume and left is not None)


def _check_left(job: Job, left: dict[str, Any], run: Any) -> None:
    """Compare with the run that was interrupted."""
    place, before = partial_folder(job.work_dir), left.get("run")
    before = before if isinstance(before, dict) else {}
    differing = [key for key in run if run[key] != before.get(key)]
    if job.config.resume and differing:
        known = [f"{key} ({before[key]!r}, now {run[key]!r})" if isinstance(run[key], (int, str)) and key in before else key for key in differing]
        raise ConfigError(f"{place}: the interrupted run differs in {', '.join(known)}; give the same options, or delete that folder")
    if not job.config.resume and left.get("kept on purpose"):
        raise ConfigError(f"{place}: holds an interrupted run that was to be continued; add --resume, or delete that folder")
    if not job.config.resume:
        logger.warning("what a killed run left at %s is removed; --resume would have kept it", place)
