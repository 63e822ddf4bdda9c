"""`quantise_awq`: from a model folder to a 4-bit folder. Checks first, then layer by layer, then the proof; the source is only read.

Memory at any time: embedding or one layer (in the type of calibration, and in float32 what is being rounded), the hidden states of the windows, and one
shard of at most 2 GB that is being filled. `--work-dir` appears when everything is done; an interrupted run leaves nothing.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.checkpoint.writer import SHARD_BYTES, ShardWriter
from lmdeploy.config import EngineConfig
from lmdeploy.engine.kv_cache import gib
from lmdeploy.engine.memory import free_bytes
from lmdeploy.engine.start import choose_device, resolve_config
from lmdeploy.errors import CheckpointError
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kernels.select import select
from lmdeploy.layers.build import BuildContext
from lmdeploy.lite.awq import LayerResult, LayerWeights, LinearWeight, Rounding, quantise_layer
from lmdeploy.lite.calibrate import LayerStream, Recorder
from lmdeploy.lite.datasets import CalibrationText, Windows, cut_windows, load_text
from lmdeploy.lite.evaluate import measure
from lmdeploy.lite.folder import check_work_dir, copy_other_files
from lmdeploy.lite.options import AwqConfig
from lmdeploy.lite.plan import LayerPlan, plan_layers
from lmdeploy.lite.report import Report, folder_bytes
from lmdeploy.log import get_logger
from lmdeploy.models.decoder import SmoothingGroup
from lmdeploy.models.registry import model_class
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec, load_spec
from lmdeploy.text.tokenizer import Tokenizer

logger = get_logger(__name__)
Show = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One run: everything that is decided before the first weight is read."""

    folder: Path
    spec: ModelSpec
    config: AwqConfig
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

    def memory_need(self) -> int:
        """Bytes of the hidden states, one layer, its float32 working copies and a shard; the largest of what is alive together."""
        spec, numbers = self.spec, max(layer.num_weights for layer in self.layers)
        largest = max(layer.largest for layer in self.layers)
        hidden = self.windows.samples.numel() * spec.hidden_size * self.dtype.itemsize if self.calibrates else 0
        tokens = self.config.batch_size * self.windows.samples.shape[1]
        width = 3 * max(spec.intermediate_size, spec.hidden_size) + 4 * spec.hidden_size
        embedding = spec.vocab_size * spec.hidden_size * self.dtype.itemsize
        copies = (9 if self.config.search_scale else 7) * largest * 4
        return hidden + max(embedding, numbers * (self.dtype.itemsize + 4 + 1) + copies + tokens * width * self.dtype.itemsize) + min(SHARD_BYTES, embedding)


def quantise_awq(model: str | None, config: AwqConfig, show: Show = logger.info) -> Report:
    """Write a 4-bit copy of a model to `config.work_dir`; `show` is given the lines that tell what happens."""
    start = time.perf_counter()
    job = prepare(model, config)
    for notice in filter(None, (job.text.notice, job.windows.notice)):
        logger.warning("%s", notice)
    need, free = job.memory_need(), free_bytes(torch.device("cpu"))
    show(f"calibrating with {job.windows.samples.shape[0]} windows of {job.windows.samples.shape[1]} tokens of {job.text.origin} on {job.device}")
    show(f"memory needed: about {gib(need)}, beside the program itself; free: {gib(free)}")
    if need > free:
        logger.warning("about %s of memory are needed and %s are free; fewer --calib-samples or a shorter --calib-seqlen need less", gib(need), gib(free))
    report = Report(
        model=str(job.folder),
        work_dir=config.work_dir,
        method=f"AWQ, {config.w_bits} bits, groups of {config.w_group_size}, {_mode(job)}",
        calibration=job.text.origin,
        samples=job.windows.samples.shape[0],
        seqlen=job.windows.samples.shape[1],
        group_size=config.w_group_size,
        search_scale=config.search_scale,
    )
    writer = ShardWriter(Path(config.work_dir).expanduser().resolve())
    try:
        _write(job, writer, report)
        measure(report, job.folder, writer.partial, job.windows.held_out, config)
        report.bytes_before, report.bytes_after = folder_bytes(job.folder), folder_bytes(writer.partial)
        report.seconds, report.peak_bytes = time.perf_counter() - start, _peak_bytes()
        report.save(writer.partial)
        writer.commit()
    except BaseException:  # Ctrl-C too: no half-written folder
        writer.discard()
        raise
    return report


def _mode(job: Job) -> str:
    if not job.calibrates:
        return "plain rounding"
    return "scales and clipping searched" if job.config.search_scale else "fixed scales"


def _peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare(model: str | None, config: AwqConfig) -> Job:
    """All checks that need no weights; every mistake of the user's is found here."""
    folder = resolve_model(model, config.download_dir, config.revision)
    spec = load_spec(folder)
    if spec.quantization is not None:
        method = spec.quantization.get("quant_method", "unknown")
        raise CheckpointError(f"{folder}: is already quantised (quant_method={method}); give the 16-bit model")
    check_work_dir(folder, Path(config.work_dir).expanduser(), overwrite=config.overwrite)
    engine = EngineConfig(dtype=config.dtype, device_type=config.device)
    device = choose_device(engine)
    dtype: torch.dtype = getattr(torch, resolve_config(engine, spec, device).dtype)
    skeleton = model_class(spec)(BuildContext(spec, Parallel(), REFERENCE, dtype, torch.device("meta")))
    layers = plan_layers(skeleton, open_source(folder), config.w_group_size)
    text = load_text(config.calib_dataset, config.download_dir)
    seqlen = min(config.calib_seqlen, spec.max_position)
    windows = cut_windows(Tokenizer(folder).encode(text.text), config.calib_samples, seqlen, config.eval_tokens)
    return Job(folder, spec, config, device, dtype, text, windows, skeleton.smoothing_groups(), layers)


def _write(job: Job, writer: ShardWriter, report: Report) -> None:
    """All tensors, layer by layer, then the rest of the folder."""
    source = open_source(job.folder)
    how = Rounding(job.config.w_group_size, job.config.search_scale and job.calibrates)
    recorder = Recorder(select("turbomind", job.device.type, job.dtype, head_dim=job.spec.head_dim), how.group, with_gram=how.search)
    stream = LayerStream(job.spec, open_source(job.folder), recorder, job.device, job.dtype)
    if job.calibrates:
        stream.embed(job.windows.samples, job.config.batch_size)
    steps = stream.num_batches + 1 if job.calibrates else 1
    with tqdm(total=steps * len(job.layers), desc="quantising", unit="step", dynamic_ncols=True, smoothing=0.1) as bar:
        for plan in job.layers:
            bar.set_postfix_str(f"layer {plan.index + 1}/{len(job.layers)}", refresh=False)
            if job.calibrates:
                for _ in stream.run(plan.index):
                    bar.update()
            result = _quantise(job, plan, source, recorder, how)
            _note(report, plan, result)
            for name, tensor in result.tensors.items():
                writer.add(plan.prefix + name, tensor)
            bar.update()
    done = {name for plan in job.layers for name in plan.tensors}
    for name in sorted(source.names() - done):
        writer.add(name, _take(source, name))
    writer.finish()
    copy_other_files(job.folder, writer.partial, job.config, [plan.prefix + name for plan in job.layers for name in plan.kept])


@torch.inference_mode()
def _quantise(job: Job, plan: LayerPlan, source: WeightSource, recorder: Recorder, how: Rounding) -> LayerResult:
    """One layer: read, smooth, round."""
    linears: dict[str, LinearWeight] = {}
    for name in plan.linears:
        full = plan.prefix + name
        weight = _take(source, f"{full}.weight", job.device)
        bias = _take(source, f"{full}.bias", job.device) if source.has(f"{full}.bias") else None
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"tensor '{full}.weight' holds NaN or infinity; the checkpoint is broken")
        linears[name] = LinearWeight(weight.float(), weight.dtype, bias, quantised=name not in plan.kept)
    others = {name: _take(source, plan.prefix + name, job.device) for name in plan.others}
    return quantise_layer(LayerWeights(linears, others), recorder.stats, job.groups, how)


def _take(source: WeightSource, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    out = torch.empty(source.shape(name), dtype=source.dtype(name), device=device)
    source.take(name, out)
    return out


def _note(report: Report, plan: LayerPlan, result: LayerResult) -> None:
    """Errors, bytes and warnings of one layer into the report."""
    errors = list(result.errors.values())
    plain, error, square = (sum(e[i] / max(e[2], 1e-30) for e in errors) / max(1, len(errors)) for i in range(3))
    report.layers.append({"layer": plan.index, "plain_error": plain, "error": error})
    assert square <= 1.001
    report.linear_bytes_before += plan.linear_bytes
    packed = ("qweight", "qzeros", "scales")
    report.linear_bytes_after += sum(t.nbytes for name, t in result.tensors.items() if name.rsplit(".", 1)[-1] in packed)
    for warning in result.warnings:
        report.warnings.append(f"layer {plan.index}: {warning}")
        logger.warning("layer %d: %s", plan.index, warning)
