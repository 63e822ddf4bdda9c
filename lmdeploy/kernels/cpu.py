"""The fast CPU kernels: `native/*.cpp` behind the signatures of `api.Kernels`.

A wrapper checks what its C code relies on (dtype, last axis contiguous, same types) and hands everything else to the reference.
It costs about 2 us: pointers are ints, argument blocks are packed bytes, argtypes are set once. Results do not depend on
what else is in the batch: a row has the same bits alone, in any batch, in any chunk and with any number of threads.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.build import NativeBuild, load_native
from lmdeploy.kernels.reference import REFERENCE, LinearW4, LinearW8, dequantising, dequantising_w8, gated
from lmdeploy.kv_layer import KVLayer, Width
from lmdeploy.log import get_logger

Tensor = torch.Tensor
logger = get_logger(__name__)

MAX_HEAD_DIM = 256
#: Inputs whose products of int8 numbers, 128 * 127 at most, surely sum up in int32.
MAX_INT8_INPUTS = 1 << 17
_W8 = (torch.int8, torch.float8_e4m3fn)
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "linear": [_P, _L, _P, _P, _P, _L, _L, _L, _L, _I],
    "linear_w4": [_P, _L, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _I, _I],
    "linear_w8": [_P, _L, _P, _P, _P, _P, _L, _L, _L, _L, _L, _I, _I],
    "linear_w8a8": [_P, _L, _P, _P, _P, _P, _L, _L, _L, _L, _I, _I],
    "rms_norm": [_P, _L, _P, _P, _F, _P, _L, _L, _I],
    "head_norm": [_P, _L, _L, _P, _F, _L, _L, _L, _I],
    "silu_mul": [_P, _P, _L, _L, _I],
    "rope_write_kv": [ctypes.c_char_p, _I],
    "attention": [ctypes.c_char_p, _I],
}
_ROPE = struct.Struct("8Q2Q5q2Q5q13q")  # RopeArgs in rope.cpp, with two of Store in kv_cache.hpp
_ATTENTION = struct.Struct("5Q2Q5q2Q5q11qf4x")  # AttentionArgs in attention.hpp
_BITS = {"16": 16, "8": 8, "4": 4}  # the widths of cache rows that are read natively


def _functions(library: ctypes.CDLL, name: str) -> dict[torch.dtype, Callable[..., int]]:
    """The C function of an operator for each dtype."""
    found: dict[torch.dtype, Callable[..., int]] = {}
    for dtype, suffix in _SUFFIX.items():
        function = library[f"lmd_{name}_{suffix}"]
        function.argtypes, function.restype = _ARGUMENTS[name], _I if name.startswith("linear_") or name == "linear" and suffix == "bf16" else None
        found[dtype] = function
    return found


def _linear(library: ctypes.CDLL, threads: int, amx: bool) -> Callable[[Tensor, Tensor, Tensor | None, Tensor], None]:
    functions = _functions(library, "linear")
    if not amx:
        del functions[torch.bfloat16]  # oneDNN is faster than anything without AMX
    fallback = REFERENCE.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        dtype = x.dtype
        function = functions.get(dtype)
        same = weight.dtype is dtype and out.dtype is dtype and (bias is None or (bias.dtype is dtype and bias.is_contiguous()))
        if function is None or not same or not weight.is_contiguous() or x.stride(1) != 1 or out.stride(1) != 1:
            fallback(x, weight, bias, out)
            return
        n, k = weight.shape
        bias_at = None if bias is None else bias.data_ptr()
        rows = x.shape[0]
        done = function(x.data_ptr(), x.stride(0), weight.data_ptr(), bias_at, out.data_ptr(), out.stride(0), rows, k, n, threads)
        if done == 0:  # out of memory for the packed rows
            fallback(x, weight, bias, out)

    return linear


def _linear_w4(library: ctypes.CDLL, threads: int, fallback: LinearW4) -> LinearW4:
    functions = _functions(library, "linear_w4")

    def linear_w4(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, out: Tensor) -> None:
        dtype = x.dtype
        function = functions.get(dtype)
        same = out.dtype is dtype and (bias is None or (bias.dtype is dtype and bias.is_contiguous()))
        small = scales.dtype is torch.float16 and zeros.dtype is torch.uint8
        known = qweight.dtype is torch.uint8 and (small or scales.dtype is zeros.dtype is torch.float32)
        packed = qweight.is_contiguous() and scales.is_contiguous() and zeros.is_contiguous()
        if function is None or not (same and known and packed) or x.stride(1) != 1 or out.stride(1) != 1:
            fallback(x, qweight, scales, zeros, bias, out)
            return
        rows, inner = x.shape
        outer, groups = scales.shape
        weight = (qweight.data_ptr(), scales.data_ptr(), zeros.data_ptr(), None if bias is None else bias.data_ptr())
        sizes = (rows, inner, outer, inner // groups, small, threads)
        if function(x.data_ptr(), x.stride(0), *weight, out.data_ptr(), out.stride(0), *sizes) == 0:  # out of memory for the packed rows
            fallback(x, qweight, scales, zeros, bias, out)

    return linear_w4


def _linear_w8(library: ctypes.CDLL, threads: int, fallback: LinearW8) -> LinearW8:
    functions = _functions(library, "linear_w8")

    def linear_w8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
        function = functions.get(x.dtype)
        if function is None or not _fits_w8(x, qweight, scales, bias, out):
            fallback(x, qweight, scales, bias, out)
            return
        rows, inner = x.shape
        outer, groups = scales.shape
        weight = (qweight.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr())
        sizes = (rows, inner, outer, inner // groups, qweight.dtype is not torch.int8, threads)
        if function(x.data_ptr(), x.stride(0), *weight, out.data_ptr(), out.stride(0), *sizes) == 0:  # out of memory for the packed rows
            fallback(x, qweight, scales, bias, out)

    return linear_w8


def _linear_w8a8(library: ctypes.CDLL, threads: int) -> LinearW8:
    functions, fallback = _functions(library, "linear_w8a8"), REFERENCE.linear_w8a8

    def linear_w8a8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> None:
        function = functions.get(x.dtype)
        rows, inner = x.shape
        if function is None or inner > MAX_INT8_INPUTS or not _fits_w8(x, qweight, scales, bias, out):
            fallback(x, qweight, scales, bias, out)
            return
        weight = (qweight.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr())
        sizes = (rows, inner, scales.shape[0], qweight.dtype is not torch.int8, threads)
        if function(x.data_ptr(), x.stride(0), *weight, out.data_ptr(), out.stride(0), *sizes) == 0:  # out of memory for the packed rows
            fallback(x, qweight, scales, bias, out)

    return linear_w8a8


def _fits_w8(x: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor) -> bool:
    """Whether types and layouts are those that the C code relies on."""
    same = out.dtype is x.dtype and (bias is None or (bias.dtype is x.dtype and bias.is_contiguous()))
    packed = scales.dtype is torch.float32 and qweight.dtype in _W8 and qweight.is_contiguous() and scales.is_contiguous()
    return same and packed and x.stride(1) == 1 and out.stride(1) == 1


def _rms_norm(library: ctypes.CDLL, threads: int) -> Callable[[Tensor, Tensor, float, Tensor], None]:
    functions, fallback = _functions(library, "rms_norm"), REFERENCE.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        dtype = x.dtype
        function = functions.get(dtype)
        if function is None or weight.dtype is not dtype or out.dtype is not dtype or x.stride(1) != 1 or not out.is_contiguous():
            fallback(x, weight, eps, out)
            return
        function(x.data_ptr(), x.stride(0), None, weight.data_ptr(), eps, out.data_ptr(), x.shape[0], x.shape[1], threads)

    return rms_norm


def _add_rms_norm(library: ctypes.CDLL, threads: int) -> Callable[[Tensor, Tensor, Tensor, float, Tensor], None]:
    functions, fallback = _functions(library, "rms_norm"), REFERENCE.add_rms_norm

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        dtype = x.dtype
        function = functions.get(dtype)
        same = weight.dtype is dtype and out.dtype is dtype and residual.dtype is dtype
        if function is None or not same or x.stride(1) != 1 or not out.is_contiguous() or not residual.is_contiguous():
            fallback(x, residual, weight, eps, out)
            return
        rows, width = x.shape
        function(x.data_ptr(), x.stride(0), residual.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), rows, width, threads)

    return add_rms_norm


def _head_norm(library: ctypes.CDLL, threads: int) -> Callable[[Tensor, Tensor, float], None]:
    functions, fallback = _functions(library, "head_norm"), REFERENCE.head_norm

    def head_norm(x: Tensor, weight: Tensor, eps: float) -> None:
        function = functions.get(x.dtype)
        if function is None or weight.dtype is not x.dtype or x.stride(2) != 1:
            fallback(x, weight, eps)
            return
        row, head, _ = x.stride()
        function(x.data_ptr(), row, head, weight.data_ptr(), eps, *x.shape, threads)

    return head_norm


def _silu_mul(library: ctypes.CDLL, threads: int) -> Callable[[Tensor, Tensor], None]:
    functions, fallback = _functions(library, "silu_mul"), REFERENCE.silu_mul

    def silu_mul(gate_up: Tensor, out: Tensor) -> None:
        function = functions.get(gate_up.dtype)
        if function is None or out.dtype is not gate_up.dtype or not gate_up.is_contiguous() or not out.is_contiguous():
            fallback(gate_up, out)
            return
        function(gate_up.data_ptr(), out.data_ptr(), *out.shape, threads)

    return silu_mul


def _part_fits(rows: Tensor, scales: Tensor | None, width: Width, dtype: torch.dtype) -> bool:
    """Keys or values of a width that is read natively, slots and dims packed, pairs of scale and offset too."""
    strides = rows.stride()
    packed = strides[3] == 1 and strides[2] == rows.shape[3]
    if width == "16":
        return packed and rows.dtype is dtype
    return packed and width in _BITS and scales is not None and scales.stride()[2:] == (2, 1) and scales.dtype is torch.bfloat16


def _cache_fits(kv: KVLayer, dtype: torch.dtype, head_dim: int) -> bool:
    """Both parts fit; what is quantised or rotated has even heads that a row buffer holds."""
    small = kv.plain and kv.rotation is None or (head_dim <= MAX_HEAD_DIM and head_dim % 2 == 0)
    return small and _part_fits(kv.key, kv.key_scales, kv.key_width, dtype) and _part_fits(kv.value, kv.value_scales, kv.value_width, dtype)


def _store(rows: Tensor, scales: Tensor | None, width: Width) -> tuple[int, ...]:
    """Keys or values as `Store` in kv_cache.hpp."""
    block, head = rows.stride()[:2]
    size = rows.element_size()
    pairs, block_pairs, head_pairs = (0, 0, 0) if scales is None else (scales.data_ptr(), scales.stride(0) // 2, scales.stride(1) // 2)
    return rows.data_ptr(), pairs, block * size, head * size, block_pairs, head_pairs, _BITS[width]


def _floats(x: Tensor | None) -> bool:
    """No tensor, or float32 without gaps."""
    return x is None or (x.dtype is torch.float32 and x.is_contiguous())


def _rope_write_kv(library: ctypes.CDLL, threads: int) -> Callable[..., None]:
    functions, fallback = _functions(library, "rope_write_kv"), REFERENCE.rope_write_kv

    def rope_write_kv(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, kv: KVLayer, slot_mapping: Tensor) -> None:
        dtype = q.dtype
        function = functions.get(dtype)
        tables = cos.dtype is torch.float32 and sin.dtype is torch.float32 and cos.is_contiguous() and sin.is_contiguous()
        scale_fits = _floats(q_scale) and _floats(kv.key_center)
        dims_packed = q.stride(2) == 1 and k.stride(2) == 1 and v.stride(2) == 1 and slot_mapping.is_contiguous()
        rows, heads, head_dim = q.shape
        if function is None or not (tables and scale_fits and dims_packed and _cache_fits(kv, dtype, head_dim)):
            fallback(q, k, v, cos, sin, q_scale, kv, slot_mapping)
            return
        pointers = [x.data_ptr() for x in (q, k, v, cos, sin)]
        pointers += [0 if x is None else x.data_ptr() for x in (q_scale, kv.key_center)]
        pointers.append(slot_mapping.data_ptr())
        stores = (*_store(kv.key, kv.key_scales, kv.key_width), *_store(kv.value, kv.value_scales, kv.value_width))
        strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
        sizes = (rows, heads, k.shape[1], head_dim, 2 * cos.shape[1], kv.key.shape[2], kv.rotation is not None)
        function(_ROPE.pack(*pointers, *stores, *strides, *sizes), threads)

    return rope_write_kv


def _attention(library: ctypes.CDLL, threads: int) -> Callable[[Tensor, Tensor, Tensor, KVLayer, AttentionMeta, float, int, Tensor], None]:
    functions, fallback = _functions(library, "attention"), REFERENCE.attention

    def attention(q: Tensor, k: Tensor, v: Tensor, kv: KVLayer, meta: AttentionMeta, scale: float, window: int, out: Tensor) -> None:
        dtype = q.dtype
        function = functions.get(dtype)
        head_dim, table = q.shape[2], meta.block_table
        plain = q.stride(2) == 1 and out.dtype is dtype and out.stride(1) == 1 and table.stride(1) == 1 and scale > 0
        if function is None or head_dim > MAX_HEAD_DIM or not plain or not _cache_fits(kv, dtype, head_dim):
            fallback(q, k, v, kv, meta, scale, window, out)
            return
        pointers = (q.data_ptr(), out.data_ptr(), meta.query_start.data_ptr(), meta.kv_lens.data_ptr(), table.data_ptr())
        stores = (*_store(kv.key, kv.key_scales, kv.key_width), *_store(kv.value, kv.value_scales, kv.value_width))
        strides = (q.stride(0), q.stride(1), table.stride(0), out.stride(0))
        sizes = (len(meta.query_lens), q.shape[1], kv.key.shape[1], head_dim, kv.key.shape[2], window, kv.rotation is not None)
        function(_ATTENTION.pack(*pointers, *stores, *strides, *sizes, scale), threads)

    return attention


def _experts(
    linear: Callable[[Tensor, Tensor, Tensor | None, Tensor], None], silu_mul: Callable[[Tensor, Tensor], None]
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]:
    def experts(x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor, out: Tensor) -> None:
        """The tokens of one expert are gathered and go through `linear` together; sums stay in float32 until the end."""
        total = torch.zeros(out.shape, dtype=torch.float32)
        choices = expert_ids.shape[1]
        order = torch.argsort(expert_ids.flatten(), stable=True)
        counts = torch.bincount(expert_ids.flatten(), minlength=gate_up.shape[0]).tolist()
        share = expert_weights.flatten()
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            picked = order[start : start + count]
            start += count
            token = picked // choices
            both = x.new_empty(count, gate_up.shape[1])
            hidden, result = x.new_empty(count, down.shape[2]), x.new_empty(count, out.shape[1])
            linear(x[token], gate_up[expert], None, both)
            silu_mul(both, hidden)
            linear(hidden, down[expert], None, result)
            total.index_add_(0, token, result.float().mul_(share[picked].unsqueeze(1)))
        out.copy_(total)

    return experts


def native_kernels(build: NativeBuild, threads: int | None = None) -> Kernels:
    """The set made of a loaded library; `threads` defaults to torch's."""
    assert build.library is not None, build.reason
    library, amx = build.library, build.variant == "amx"
    workers = threads or torch.get_num_threads()
    linear, silu_mul = _linear(library, workers, amx), _silu_mul(library, workers)
    return Kernels(
        linear=linear,
        linear_silu=gated(linear, silu_mul),
        linear_w4=_linear_w4(library, workers, dequantising(linear)),
        linear_w8=_linear_w8(library, workers, dequantising_w8(linear)),
        linear_w8a8=_linear_w8a8(library, workers),
        rms_norm=_rms_norm(library, workers),
        add_rms_norm=_add_rms_norm(library, workers),
        head_norm=_head_norm(library, workers),
        rope_write_kv=_rope_write_kv(library, workers),
        attention=_attention(library, workers),
        silu_mul=silu_mul,
        experts=_experts(linear, silu_mul),
        names=dict.fromkeys(REFERENCE.names, f"native {build.variant}"),
    )


def read_bandwidth(build: NativeBuild, data: Tensor, threads: int) -> float:
    """GB/s at which this machine reads `data` (contiguous, larger than the caches) once: the best of five."""
    assert build.library is not None, build.reason
    function = build.library["lmd_read"]
    function.argtypes, function.restype = [_P, _L, _I], ctypes.c_uint64
    nbytes = data.nbytes // 256 * 256
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        function(data.data_ptr(), nbytes, threads)
        best = min(best, time.perf_counter() - start)
    return nbytes / best / 1e9


def cpu_kernels(threads: int | None = None, cache_dir: Path | None = None) -> Kernels:
    """The native set, or the reference with a warning that says why."""
    build = load_native(cache_dir)
    if build.library is None:
        logger.warning("CPU kernels fall back to torch: %s", build.reason)
        return replace(REFERENCE, names=dict.fromkeys(REFERENCE.names, "torch"))
    return native_kernels(build, threads)
