"""From a model folder and options to a running engine. Everything "auto" or unset is decided here, once, and logged.

`resolve_config` is pure: numbers and names in, a new config out. `build_engine` puts kernels, model, runner, executor and engine together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lmdeploy.checkpoint.random_source import RandomSource
from lmdeploy.checkpoint.rename import RenamedSource
from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.config import EngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.executor.local import LocalExecutor
from lmdeploy.engine.grammar_compiler import GrammarCompiler
from lmdeploy.engine.kv_cache import KVLayout
from lmdeploy.engine.mask_pool import MaskPool
from lmdeploy.engine.memory import free_bytes, hold_steady
from lmdeploy.engine.quality import examine, judge
from lmdeploy.engine.runner import ModelRunner
from lmdeploy.engine.scheduler import Fill
from lmdeploy.engine.sizing import SEE_PLAN, choose_format, gib, pool_request, unset_limits
from lmdeploy.engine.weights import Facts, Weights
from lmdeploy.errors import ConfigError, EngineError
from lmdeploy.formats.choose import choose_formats
from lmdeploy.kernels.select import can_be_captured, pads_rows, select
from lmdeploy.layers.build import reload
from lmdeploy.log import get_logger
from lmdeploy.messages import EngineInfo
from lmdeploy.models.decoder import Decoder
from lmdeploy.models.language import find_language
from lmdeploy.models.language_spec import language_spec
from lmdeploy.models.registry import build_model
from lmdeploy.models.vision import UNREAD, VisionEncoder
from lmdeploy.models.weight_bytes import FP8, HEADS, stored, weights_of
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec, RopeSpec
from lmdeploy.vision.spec import VisionSpec, load_vision_spec

logger = get_logger(__name__)
#: For 16-bit weights that every token reads; sums of both numbers are sizes of graphs. On an H200, 7B shape, 256 rows take 38 % longer than 64, 320 86 %. With 64
#: answers and a prompt whenever one ends, 512 requests took 13.6 s instead of 14.1, and the slowest of a hundred gaps between tokens fell from 26 to 10 ms.
FILL = Fill(((64, 192), (128, 128), (1 << 30, 512)), 4096)


def choose_device(config: EngineConfig) -> torch.device:
    """auto: cuda if there is one, else cpu. An explicit choice that is not there is an error, never a fallback."""
    found = torch.cuda.is_available()
    if config.device_type == "cuda" and not found:
        raise ConfigError("device_type='cuda', but torch finds no usable CUDA device; use device_type='cpu' or install a CUDA build of torch")
    if config.device_type == "cpu" or not found:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_config(config: EngineConfig, spec: ModelSpec, device: torch.device) -> EngineConfig:
    """A copy in which nothing is 'auto' or None any more; what the caller gave stays, or is an error."""
    cpu = device.type == "cpu"
    changes: dict[str, Any] = {"device_type": device.type, "dtype": _resolve_dtype(config.dtype, spec, device)}
    changes |= unset_limits(config, spec, cpu=cpu)
    if config.session_len is not None and config.session_len > spec.max_position and not _stretches(spec):
        logger.warning(
            "session_len=%d is beyond the %d positions that the model was made for; answers may become incoherent there (see rope_scaling_factor)",
            config.session_len,
            spec.max_position,
        )
    if cpu and config.cpu_threads is None:
        changes["cpu_threads"] = torch.get_num_threads()
    resolved = config.replace(**changes)
    for name in sorted(changes):
        logger.info("%s = %s%s", name, getattr(resolved, name), "" if getattr(config, name) == getattr(resolved, name) else " (chosen)")
    return resolved


def _stretches(spec: ModelSpec) -> bool:
    return spec.rope.kind == "dynamic" and spec.rope.factor > 1


def _resolve_dtype(dtype: str, spec: ModelSpec, device: torch.device) -> str:
    """auto on CPU: bfloat16 where the processor multiplies it; on CUDA: the checkpoint's own 16-bit type, float16 for float32."""
    if device.type == "cpu":
        if dtype == "float16":
            logger.warning("dtype=float16 is slow on CPU: matrix products have no fast path; use bfloat16 or auto")
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return dtype if dtype != "auto" else "bfloat16" if fast else "float32"
    if dtype != "auto":
        return dtype
    return "bfloat16" if spec.dtype == "bfloat16" and torch.cuda.is_bf16_supported() else "float16"


def adapt_spec(spec: ModelSpec, config: EngineConfig) -> ModelSpec:
    """The spec with what the options change of the architecture: dynamic NTK and logn attention."""
    if config.rope_scaling_factor > 0:
        old = spec.rope
        if old.kind not in ("default", "dynamic", "linear"):
            raise ConfigError(f"rope_scaling_factor={config.rope_scaling_factor} cannot be combined with the model's own '{old.kind}' rope; leave it out")
        rope = RopeSpec("dynamic", old.theta, old.rotary_dim, config.rope_scaling_factor, spec.max_position)
        spec = dataclasses.replace(spec, rope=rope)
    return dataclasses.replace(spec, use_logn=True) if config.use_logn_attn else spec


def _check_room(spec: ModelSpec, vision: VisionSpec | None, config: EngineConfig, number_bytes: int, device: torch.device) -> None:
    """Refuse before minutes of loading, or the system's killer, what cannot be held."""
    storage = FP8 if config.model_format == "fp8" and not spec.quantization else stored(spec)
    need, free = weights_of(spec, storage, HEADS[config.head_bits], number_bytes, vision=vision).total, free_bytes(device)
    if need > free:
        raise ConfigError(f"the weights take {gib(need)} as {storage.name}, but {gib(free)} are free on {device}; {SEE_PLAN}")


def build_engine(model_path: Path, config: EngineConfig) -> Engine:
    """Load the model of a folder and start an engine for it. Raises ConfigError or CheckpointError before any request is accepted."""
    with contextlib.ExitStack() as failed:
        engine = _build(model_path, config, failed)
        failed.pop_all()  # it is the engine's now
        return engine


def _build(model_path: Path, config: EngineConfig, failed: contextlib.ExitStack) -> Engine:
    """`failed` gets what is to be closed if nothing comes of it."""
    start = time.perf_counter()
    device = choose_device(config)
    spec = adapt_spec(language_spec(model_path, config.hf_overrides), config)
    formats = choose_formats(
        spec.quantization, config.model_format, str(model_path), head_bits=config.head_bits, quantise_activations=config.quantise_activations
    )
    kv_format = choose_format(config.quant_policy, config.kv_rotation, spec.head_dim, _capability(device))
    resolved = resolve_config(config, spec, device)
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    if device.type == "cpu":
        hold_steady()
    dtype: torch.dtype = getattr(torch, resolved.dtype)
    kernels = select(resolved.backend, device.type, dtype, head_dim=spec.head_dim, threads=resolved.cpu_threads)
    vision = load_vision_spec(model_path)
    _check_room(spec, vision, config, dtype.itemsize, device)
    encoder = None if vision is None else VisionEncoder(vision, spec.hidden_size, dtype, device, resolved.vision_max_batch_size)
    model = build_model(
        spec, dtype, device, kernels, Parallel(), formats if encoder is None else dataclasses.replace(formats, unused=(*formats.unused, *UNREAD))
    )
    with ThreadPoolExecutor(1) as opener:  # the vocabulary is made ready for grammars while the weights are read
        opening = opener.submit(_open_grammars, model_path, spec, device)
        failed.callback(_close, opening)
        _load(model, encoder, model_path, config)
    logger.info("%s: %s of weights in %.1f s", spec.architecture, gib(model.weight_bytes), time.perf_counter() - start)
    examined = examine(model, model_path, resolved, kv_format, device, dtype)
    if examined.quality is not None:
        judge(examined.quality, resolved.strict_quality)
    pool, grammars = pool_request(config, resolved), _grammars(opening)
    graphed = not resolved.eager_mode and can_be_captured(kernels, device.type, spec) and not model.waits_for_device()
    runner = ModelRunner(
        model, resolved, pool, device, dtype, kv_layout=examined.layout, pads_rows=pads_rows(kernels), vision=encoder, grammars=grammars, graphed=graphed
    )
    _tell(runner, logging.WARNING if config.session_len is None and runner.session_len < (resolved.session_len or 0) else logging.INFO)
    info = EngineInfo(
        session_len=runner.session_len,
        vocab_size=spec.vocab_size,
        max_batch_size=runner.max_batch_size,
        memory=runner.memory,
        kernels=dict(kernels.names),
        dtype=resolved.dtype,
        start_seconds=time.perf_counter() - start,
        step_seconds=runner.step_seconds,
        kv_quality=examined.quality,
    )

    def layout() -> KVLayout:
        return examine(model, model_path, resolved, kv_format, device, dtype).layout

    return Engine(
        LocalExecutor(runner, info, _weights_of(model, encoder, model_path, config), layout if examined.layout.key_centers else None),
        max_prefill_token_num=resolved.max_prefill_token_num,
        max_waiting=resolved.max_waiting,
        enable_prefix_caching=resolved.enable_prefix_caching,
        rope_depends_on_length=spec.rope.depends_on_length,
        grammars=grammars,
        fill=FILL if device.type == "cuda" and not spec.quantization and config.model_format != "fp8" and not spec.num_experts else None,
        run_ahead=int(graphed),  # the next step is launched before the tokens of this one are seen
    )


def _open_grammars(model_path: Path, spec: ModelSpec, device: torch.device) -> GrammarCompiler | MaskPool:
    """Beside a GPU in processes of their own."""
    if device.type != "cuda":
        return GrammarCompiler.open(model_path, spec.vocab_size, spec.eos_token_ids)
    pool = MaskPool(model_path, spec.vocab_size, spec.eos_token_ids)
    pool.opened()
    return pool


def _grammars(opening: Future[GrammarCompiler | MaskPool]) -> GrammarCompiler | MaskPool | None:
    """None for a folder whose tokenizer cannot be used: such an engine answers token ids, without grammars. Raises EngineError where it can, and they do not start."""
    try:
        return opening.result()
    except EngineError:
        raise
    except Exception as e:
        logger.info("no grammars: %s", e)
        return None


def _tell(runner: ModelRunner, level: int) -> None:
    """The bill shows it, too; a shorter session must not pass unseen in Python either."""
    for note in runner.memory.note.splitlines():
        logger.log(level, "%s", note)


def _close(opening: Future[GrammarCompiler | MaskPool]) -> None:
    if opening.exception() is None:
        opening.result().close()


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _load(model: Decoder, encoder: VisionEncoder | None, model_path: Path, config: EngineConfig, folder: Path | None = None) -> None:
    """Pull all weights; in a vision-language folder the decoder's have other names. `folder`: of new ones, for a model that is loaded."""
    source = _source(folder or model_path, config)
    if encoder is not None:
        if folder is None:
            encoder.load(source, model_path)
        else:
            reload(encoder, lambda: encoder.load(source, model_path))
        if not config.random_weights:
            source = RenamedSource(source, find_language(model_path).rules)
    model.load(source, again=folder is not None)


def _source(folder: Path, config: EngineConfig) -> WeightSource:
    return RandomSource() if config.random_weights else open_source(folder)


def _weights_of(model: Decoder, encoder: VisionEncoder | None, model_path: Path, config: EngineConfig) -> Weights:
    def tensors() -> Iterator[torch.Tensor]:
        yield from model.tensors()
        if encoder is not None:
            yield from encoder.tensors()

    def facts_of(folder: Path) -> Facts:
        spec = adapt_spec(language_spec(folder, config.hf_overrides), config) if (folder / "config.json").is_file() else model.spec
        return Facts.of(spec, _source(folder, config))

    return Weights(tensors, lambda folder: _load(model, encoder, model_path, config, folder), facts_of, model_path)
