"""The skeleton of all `lite` commands that write something: checks, then layer by layer, then the proof; the source is only read.

Memory at any time: embedding or one layer (in the type of calibration, and in float32 what is being rounded), the hidden states of the windows, and one
shard of at most 2 GB. `--work-dir` appears when everything is done; an interrupted run leaves nothing, or with `--resume` its finished layers.
"""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.checkpoint.writer import ShardWriter
from lmdeploy.engine.memory import free_bytes
from lmdeploy.engine.sizing import gib
from lmdeploy.errors import CheckpointError, ConfigError, LmdeployError
from lmdeploy.kernels.select import select
from lmdeploy.lite.awq import LayerResult, LayerWeights, LinearWeight
from lmdeploy.lite.calibrate import LayerStream, Recorder
from lmdeploy.lite.evaluate import measure
from lmdeploy.lite.folder import STATISTICS, copy_other_files
from lmdeploy.lite.gptq import GptqMethod
from lmdeploy.lite.job import Job, open_writer, prepare
from lmdeploy.lite.method import AwqMethod, Method
from lmdeploy.lite.options import AwqConfig, CalibrateConfig, GptqConfig, LiteConfig, SmoothQuantConfig
from lmdeploy.lite.plan import LayerPlan
from lmdeploy.lite.report import Report, folder_bytes
from lmdeploy.lite.smoothquant import SmoothQuantMethod
from lmdeploy.lite.statistics import StatisticsMethod, summary
from lmdeploy.log import get_logger

logger = get_logger(__name__)
Show = Callable[[str], None]


def quantise_awq(model: str | None, config: AwqConfig, show: Show = logger.info) -> Report:
    """Write a 4-bit copy of a model to `config.work_dir`; `show` is given the lines that tell what happens."""
    return quantise(model, config, AwqMethod(config.w_group_size, config.search_scale and config.calib_samples > 0), show)


def quantise_gptq(model: str | None, config: GptqConfig, show: Show = logger.info) -> Report:
    """The same with GPTQ."""
    return quantise(model, config, GptqMethod(config.w_group_size, config.w_sym, config.desc_act, config.damp), show)


def quantise_smooth(model: str | None, config: SmoothQuantConfig, show: Show = logger.info) -> Report:
    """A copy with 8-bit weights, whose activations are quantised while it runs."""
    return quantise(model, config, SmoothQuantMethod(getattr(torch, config.stored_dtype), config.search_scale), show)


def quantise(model: str | None, config: LiteConfig, method: Method, show: Show = logger.info) -> Report:
    """Write a copy of a model by any method. Raises ConfigError and CheckpointError; the folder appears only when everything went well."""
    start = time.perf_counter()
    job = prepare(model, config, method)
    _announce(job, show)
    report = Report(
        model=str(job.folder),
        work_dir=config.work_dir,
        method=method.title(calibrated=job.calibrates),
        calibration=job.text.origin,
        samples=job.windows.samples.shape[0],
        seqlen=job.windows.samples.shape[1],
        group_size=method.group,
        search_scale=getattr(config, "search_scale", False),
    )
    with _folder_in_the_making(job, job.output_bytes()) as writer:
        for note in write_layers(job, writer):
            report.layers.append({key: note[key] for key in ("layer", "plain_error", "error", "seconds", "rounding_seconds")})
            report.linear_bytes_before += note["bytes_before"]
            report.linear_bytes_after += note["bytes_after"]
            report.warnings += [f"layer {note['layer']}: {text}" for text in note["warnings"]]
        _write_rest(job, writer)
        measure(report, job.folder, writer.partial, job.windows.held_out, config)
        report.bytes_before, report.bytes_after = folder_bytes(job.folder), folder_bytes(writer.partial)
        report.seconds, report.peak_bytes = time.perf_counter() - start, _peak_bytes()
        report.save(writer.partial)
    return report


def calibrate_model(model: str | None, config: CalibrateConfig, show: Show = logger.info) -> dict[str, Any]:
    """Write what goes into every linear layer: activations-*.safetensors, and a summary in activations.json, which is returned too."""
    job = prepare(model, config, StatisticsMethod())
    if not job.calibrates:
        raise ConfigError("calib_samples=0 leaves nothing to measure; give at least 1")
    _announce(job, show)
    with _folder_in_the_making(job) as writer:
        for _ in write_layers(job, writer):
            pass
        writer.finish("activations")
        found = summary(writer.partial, str(job.folder), job.text.origin, list(job.windows.samples.shape))
        (writer.partial / STATISTICS).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def _announce(job: Job, show: Show) -> None:
    """Notices, and the memory that will be needed."""
    for notice in filter(None, (job.text.notice, job.windows.notice)):
        logger.warning("%s", notice)
    show(f"calibrating with {job.windows.samples.shape[0]} windows of {job.windows.samples.shape[1]} tokens of {job.text.origin} on {job.device}")
    if job.language.inside:
        show(f"only the language model is quantised; {', '.join(job.language.others)} stay as they are")
    for kind, need in job.memory_need(job.home()).items():
        free = free_bytes(torch.device(kind))
        place = "beside the program itself" if kind == "cpu" else f"on {kind}"
        show(f"memory needed: about {gib(need)}, {place}; free: {gib(free)}")
        if need > free:
            logger.warning("about %s are needed %s and %s are free; fewer --calib-samples or a shorter --calib-seqlen need less", gib(need), place, gib(free))


@contextlib.contextmanager
def _folder_in_the_making(job: Job, needed: int = 0) -> Iterator[ShardWriter]:
    """The writer; its folder gets its name at the end of the block. Ctrl-C and errors remove it, unless it is to be continued."""
    writer = open_writer(job, needed)
    try:
        yield writer
        writer.commit()
    except BaseException as error:
        if job.config.resume and (not isinstance(error, LmdeployError) or "cannot be written" in str(error)):
            logger.warning("%d parts are kept in %s; the same command continues there", writer.leave(), writer.partial)
        else:
            writer.discard()
        raise


def write_layers(job: Job, writer: ShardWriter) -> Iterator[dict[str, Any]]:
    """Quantise and write layer after layer, each a part; yields what is to be noted of each. Layers of an interrupted run are only run through."""
    source, method, home = job.language.open(job.folder), job.method, job.home()
    kernels = select("turbomind", job.device.type, job.dtype, head_dim=job.language.spec.head_dim)
    recorder = Recorder(kernels, method.gram_group or 0, with_gram=method.gram_group is not None)
    stream = LayerStream(job.language.spec, job.language.open(job.folder), recorder, job.device, job.dtype)
    stream.home = home
    labels = [f"layer-{plan.index:05d}" for plan in job.layers]
    left = next((i for i, label in enumerate(labels) if label not in writer.notes), len(labels))
    calibrates = job.calibrates and left < len(labels)
    if calibrates:
        stream.embed(job.windows.samples, job.config.batch_size)
    steps = stream.num_batches + 1 if calibrates else 1
    with tqdm(total=steps * len(labels), desc="quantising", unit="step", dynamic_ncols=True, smoothing=0.1) as bar:
        for plan, label in zip(job.layers, labels, strict=True):
            bar.set_postfix_str(f"layer {plan.index + 1}/{len(labels)}", refresh=False)
            recorder.paused = done = label in writer.notes
            start = time.perf_counter()
            if calibrates:
                for _ in stream.run(plan.index):
                    bar.update()
            yield writer.keep_part(label) if done else _write_layer(job, plan, source, recorder, writer, start)
            bar.update()


def _write_layer(job: Job, plan: LayerPlan, source: WeightSource, recorder: Recorder, writer: ShardWriter, start: float) -> dict[str, Any]:
    """One layer, durable; returns its note."""
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)  # so that the times below are true; rounding waits for the statistics anyway
    begin = time.perf_counter()
    result = _quantise(job, plan, source, recorder)
    for name, tensor in result.tensors.items():
        writer.add(job.language.stored(plan.prefix + name), tensor)
    note = {**_note(plan, result), "seconds": time.perf_counter() - start, "rounding_seconds": time.perf_counter() - begin}
    writer.close_part(f"layer-{plan.index:05d}", note)
    return note


@torch.inference_mode()
def _quantise(job: Job, plan: LayerPlan, source: WeightSource, recorder: Recorder) -> LayerResult:
    """One layer: read, smooth, round."""
    linears: dict[str, LinearWeight] = {}
    for name in plan.linears:
        full = plan.prefix + name
        weight = _take(source, f"{full}.weight", job.device)
        bias = _take(source, f"{full}.bias", job.device) if source.has(f"{full}.bias") else None
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"tensor '{job.language.stored(full)}.weight' holds NaN or infinity; the checkpoint is broken")
        linears[name] = LinearWeight(weight.float(), weight.dtype, bias, quantised=name not in plan.kept)
    others = {name: _take(source, plan.prefix + name, job.device) for name in plan.others}
    return job.method.quantise(LayerWeights(linears, others), recorder.stats, job.groups)


def _write_rest(job: Job, writer: ShardWriter) -> None:
    """Every other tensor as it is, then the rest of the folder."""
    source, language = open_source(job.folder), job.language
    done = {language.stored(name) for plan in job.layers for name in plan.tensors}
    for name in sorted(source.names() - done):
        writer.add(name, _take(source, name))
    writer.finish()
    copy_other_files(job.folder, writer.partial, job.method.entry(job.kept))


def _take(source: WeightSource, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    out = torch.empty(source.shape(name), dtype=source.dtype(name), device=device)
    source.take(name, out)
    return out


def _note(plan: LayerPlan, result: LayerResult) -> dict[str, Any]:
    """Errors relative to the outputs' square (means over modules), bytes and warnings of one layer."""
    errors = list(result.errors.values())
    plain, error, square = (sum(e[i] / max(e[2], 1e-30) for e in errors) / max(1, len(errors)) for i in range(3))
    assert square <= 1.001
    for warning in result.warnings:
        logger.warning("layer %d: %s", plan.index, warning)
    quantised = {name for name in plan.linears if name not in plan.kept}
    after = sum(t.nbytes for name, t in result.tensors.items() if name.rpartition(".")[0] in quantised and not name.endswith(".bias"))
    return {
        "layer": plan.index,
        "plain_error": plain,
        "error": error,
        "bytes_before": plan.linear_bytes,
        "bytes_after": after,
        "warnings": result.warnings,
    }


def _peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
