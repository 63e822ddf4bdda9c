"""Each CPU kernel next to the ceiling measured in the same run, and next to torch: `python -m benchmark.kernels`.

Shapes of InternLM2.5-1.8B. Weights and caches rotate over more than a gigabyte, so that they come from memory as in a decode step,
not from a cache. A row's percentage is against the nearer of the two limits: bytes / read bandwidth or flops / matmul rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmark import common
from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.build import NativeBuild, load_native
from lmdeploy.kernels.cpu import native_kernels, read_bandwidth
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kv_layer import KVFormat, KVLayer

Tensor = torch.Tensor
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTER, BLOCK_SIZE = 2048, 16, 8, 128, 8192, 64
LINEARS = {"qkv": (2048, 4096), "o": (2048, 2048), "gate_up": (2048, 16384), "down": (8192, 2048), "head": (2048, 92544)}
BYTES_TO_ROTATE = 1_200_000_000
KV_FORMATS = {"16": KVFormat(), "8": KVFormat("8", "8"), "k8v4": KVFormat("8", "4", rotated=True), "4": KVFormat("4", "4", rotated=True)}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size: `run(i)` works on the i-th of `copies` sets of data."""

    name: str
    nbytes: float
    flops: float
    copies: int
    run: Callable[[Kernels, int], None]


def seconds_per_call(case: Case, kernels: Kernels, budget: float) -> float:
    """Median over rounds, each of several calls on different data, within about `budget` seconds."""
    case.run(kernels, 0)
    start = time.perf_counter()
    case.run(kernels, 1 % case.copies)
    once = time.perf_counter() - start
    calls = max(1, min(case.copies if case.copies > 1 else 1000, int(budget / 5 / max(once, 1e-6))))
    rounds, at = [], 0
    for _ in range(5):
        start = time.perf_counter()
        for i in range(at, at + calls):
            case.run(kernels, i % case.copies)
        rounds.append((time.perf_counter() - start) / calls)
        at += calls
    return statistics.median(rounds)


def linear_case(name: str, rows: int, dtype: torch.dtype, pool: Tensor) -> Case:
    """One matrix of the model times `rows` rows; distinct weights are cut from `pool`."""
    inner, outer = LINEARS[name]
    copies = max(1, pool.numel() // (inner * outer))
    weights = pool[: copies * inner * outer].view(copies, outer, inner)
    x, out = torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype)
    nbytes = (inner * outer + rows * (inner + outer)) * dtype.itemsize
    return Case(f"linear {name} T={rows}", nbytes, 2.0 * rows * inner * outer, copies, lambda k, i: k.linear(x, weights[i], None, out))


def linear_w4_case(name: str, rows: int, dtype: torch.dtype, pool: Tensor, group: int = 128) -> Case:
    """The same with 4-bit weights; codes are cut from the bytes of `pool`, groups of `group` inputs."""
    inner, outer = LINEARS[name]
    raw, half, groups = pool.view(torch.uint8), inner * outer // 2, outer * inner // group
    copies = max(1, raw.numel() // (half + 3 * groups))
    codes = raw[: copies * half].view(copies, outer, inner // 2)
    scales, zeros = torch.rand(copies, outer, inner // group).half(), torch.randint(0, 16, (copies, outer, inner // group), dtype=torch.uint8)
    x, out = torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype)
    nbytes = half + 3 * groups + rows * (inner + outer) * dtype.itemsize

    def run(kernels: Kernels, i: int) -> None:
        kernels.linear_w4(x, codes[i], scales[i], zeros[i], None, out)

    return Case(f"linear_w4 {name} T={rows}", nbytes, 2.0 * rows * inner * outer, copies, run)


def linear_w8_case(name: str, rows: int, dtype: torch.dtype, pool: Tensor, width: torch.dtype, group: int = 0) -> Case:
    """The same with 8-bit weights; `group` inputs share a scale, 0: all of a row."""
    inner, outer = LINEARS[name]
    copies = max(1, pool.nbytes // (inner * outer))
    codes = pool.view(torch.uint8)[: copies * inner * outer].view(width).view(copies, outer, inner)
    scales = torch.rand(copies, outer, inner // (group or inner))
    x, out = torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype)
    nbytes = inner * outer + scales[0].nbytes + rows * (inner + outer) * dtype.itemsize
    kind = f"{'int8' if width is torch.int8 else 'fp8'}{f' g{group}' if group else ''}"
    return Case(f"linear_w8 {kind} {name} T={rows}", nbytes, 2.0 * rows * inner * outer, copies, lambda k, i: k.linear_w8(x, codes[i], scales[i], None, out))


def linear_w8a8_case(name: str, rows: int, dtype: torch.dtype, pool: Tensor) -> Case:
    """int8 weights with activations quantised on the way; the matmul ceiling is still that of bfloat16."""
    inner, outer = LINEARS[name]
    copies = max(1, pool.nbytes // (inner * outer))
    codes = pool.view(torch.int8)[: copies * inner * outer].view(copies, outer, inner)
    scales, x, out = torch.rand(copies, outer, 1), torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype)
    nbytes = inner * outer + 4 * outer + rows * (inner + outer) * dtype.itemsize
    return Case(f"linear_w8a8 int8 {name} T={rows}", nbytes, 2.0 * rows * inner * outer, copies, lambda k, i: k.linear_w8a8(x, codes[i], scales[i], None, out))


def experts_case(rows: int, dtype: torch.dtype, pool: Tensor, choices: int = 8, width: int = 2048, inner: int = 768) -> Case:
    """Experts of Qwen3-30B-A3B's size, 64 of them or as many as `pool` holds; each call goes to others."""
    count, copies = min(64, pool.numel() // (3 * width * inner)), 16
    parts = pool[: 3 * count * width * inner].split([2 * count * width * inner, count * width * inner])
    gate_up, down = parts[0].view(count, 2 * inner, width), parts[1].view(count, width, inner)
    ids = [torch.rand(rows, count).topk(choices).indices for _ in range(copies)]
    x, out, weights = torch.randn(rows, width).to(dtype), torch.empty(rows, width, dtype=dtype), torch.full((rows, choices), 1 / choices)
    used = sum(len(torch.unique(some)) for some in ids) / copies
    nbytes = (3 * used * width * inner + 2 * rows * width) * dtype.itemsize
    name, flops = f"experts E={count} k={choices} T={rows}", 6.0 * rows * choices * width * inner
    return Case(name, nbytes, flops, copies, lambda kernels, i: kernels.experts(x, gate_up, down, ids[i], weights, out))


def cut_caches(policy: str, blocks: int, head_dim: int, dtype: torch.dtype, pool: Tensor) -> list[KVLayer]:
    """As many caches of `blocks` blocks as `pool` holds; what it holds are the numbers, scales are set."""
    fmt, raw = KV_FORMATS[policy], pool.view(torch.uint8)
    nbytes = fmt.layer_bytes(blocks, KV_HEADS, BLOCK_SIZE, head_dim, dtype)
    copies = max(1, raw.numel() // nbytes)
    layers = [fmt.layer(raw[i * nbytes : (i + 1) * nbytes], blocks, KV_HEADS, BLOCK_SIZE, head_dim, dtype) for i in range(copies)]
    for scales in (part for layer in layers for part in (layer.key_scales, layer.value_scales) if part is not None):
        scales.uniform_(0.005, 0.01)
    return layers


def attention_case(query_len: int, kv_len: int, sequences: int, dtype: torch.dtype, pool: Tensor, policy: str = "16", head_dim: int = HEAD_DIM) -> Case:
    """Equal sequences over a shuffled cache; the caches of different layers are cut from `pool`."""
    per_sequence = (kv_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    blocks, rows = per_sequence * sequences, query_len * sequences
    layers = cut_caches(policy, blocks, head_dim, dtype, pool)
    q, out = torch.randn(rows, HEADS, head_dim).to(dtype), torch.empty(rows, HEADS * head_dim, dtype=dtype)
    table = torch.randperm(blocks).int().view(sequences, per_sequence)
    start = torch.arange(0, rows + 1, query_len, dtype=torch.int32)
    lens = [kv_len] * sequences
    decodes = sequences if query_len == 1 else 0
    meta = AttentionMeta(start, torch.tensor(lens, dtype=torch.int32), table, torch.empty(0, dtype=torch.int64), [query_len] * sequences, lens, decodes)
    pairs = sequences * (query_len * (kv_len - query_len) + query_len * (query_len + 1) / 2)
    nbytes = sequences * kv_len * KV_HEADS * KV_FORMATS[policy].bytes_per_row(head_dim, dtype) + 2 * rows * HEADS * head_dim * dtype.itemsize
    scale = head_dim**-0.5

    def run(kernels: Kernels, i: int) -> None:
        kernels.attention(q, q, q, layers[i], meta, scale, 0, out)

    name = f"attention kv{policy} D={head_dim} B={sequences} new={query_len} kv={kv_len}"
    return Case(name, nbytes, 4.0 * pairs * HEADS * head_dim, len(layers), run)


def memory_of(fmt: KVFormat, blocks: int, dtype: torch.dtype) -> Tensor:
    """Zeros for the cache of one layer."""
    return torch.zeros(fmt.layer_bytes(blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype), dtype=torch.uint8)


def write_kv(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: KVLayer, kernels: Kernels, _: int) -> None:
    """One call of rope_write_kv."""
    kernels.rope_write_kv(q, k, v, cos, sin, None, cache, slots)


def small_cases(rows: int, dtype: torch.dtype) -> list[Case]:
    """Norms, SiLU and rope: their data was just written by the step, so it is in cache and is not rotated."""
    x, residual, weight = torch.randn(rows, HIDDEN).to(dtype), torch.randn(rows, HIDDEN).to(dtype), torch.ones(HIDDEN, dtype=dtype)
    out, both, mixed = torch.empty_like(x), torch.randn(rows, 2 * INTER).to(dtype), torch.empty(rows, INTER, dtype=dtype)
    qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)
    q, k, v = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
    angles, slots = torch.randn(rows, HEAD_DIM // 2), torch.randperm(rows + BLOCK_SIZE)[:rows]
    cos, sin = angles.cos(), angles.sin()
    blocks = rows // BLOCK_SIZE + 2
    caches = {policy: fmt.layer(memory_of(fmt, blocks, dtype), blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype) for policy, fmt in KV_FORMATS.items()}
    return [
        Case(f"rms_norm T={rows}", 2.0 * x.nbytes, 0, 1, lambda kernels, _: kernels.rms_norm(x, weight, 1e-5, out)),
        Case(f"add_rms_norm T={rows}", 4.0 * x.nbytes, 0, 1, lambda kernels, _: kernels.add_rms_norm(x, residual.zero_(), weight, 1e-5, out)),
        Case(f"silu_mul T={rows}", 1.5 * both.nbytes, 0, 1, lambda kernels, _: kernels.silu_mul(both, mixed)),
        *(
            Case(f"rope_write_kv kv{policy} T={rows}", 2.0 * qkv.nbytes, 0, 1, partial(write_kv, q, k, v, cos, sin, slots, cache))
            for policy, cache in caches.items()
        ),
    ]


def measure_ceilings(build: NativeBuild, pool: Tensor, threads: int) -> common.Ceilings:
    """Read bandwidth over the pool, and torch's best large product of the same type."""
    read = read_bandwidth(build, pool, threads)
    side = 2048
    a = torch.randn(side, side).to(pool.dtype)
    out = torch.empty_like(a)
    return common.Ceilings(read, 2 * side**3 / common.timed(lambda: torch.mm(a, a, out=out)) / 1e9)


def show(case: Case, seconds: float, torch_seconds: float | None, ceilings: common.Ceilings) -> None:
    """One line of the table."""
    floor = max(case.nbytes / ceilings.read_gbs, case.flops / ceilings.bf16_gflops) / 1e9
    peer = f"{torch_seconds / seconds:6.2f}x" if torch_seconds is not None else "      -"
    rates = f"{case.nbytes / seconds / 1e9:8.1f} GB/s {case.flops / seconds / 1e9:7.0f} GFLOP/s"
    print(f"{case.name:<44}{seconds * 1e6:10.1f} us {rates} {100 * floor / seconds:6.0f} % {peer}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 512], help="rows of the linear layers")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for one figure")
    parser.add_argument("--no-torch", action="store_true", help="do not measure torch beside it")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    build = load_native()
    if build.library is None:
        raise SystemExit(f"no native kernels here: {build.reason}")
    kernels, dtype = native_kernels(build, args.threads), getattr(torch, args.dtype)
    pool = torch.empty(BYTES_TO_ROTATE // dtype.itemsize, dtype=dtype).uniform_(-1, 1)
    ceilings = measure_ceilings(build, pool, args.threads)
    print(f"{args.dtype}, {args.threads} threads, native {build.variant}; others keep {common.busy_cores():.2f} cores busy")
    print(f"ceilings of this run: read {ceilings.read_gbs:.1f} GB/s, torch matmul {ceilings.bf16_gflops:.0f} GFLOP/s; last column: times as fast as torch")
    cases = [linear_case(name, rows, dtype, pool) for name in LINEARS for rows in args.rows]
    cases += [linear_w4_case(name, rows, dtype, pool) for name in LINEARS for rows in args.rows]
    widths = ((torch.int8, 0), (torch.float8_e4m3fn, 0), (torch.float8_e4m3fn, 128))
    cases += [linear_w8_case(name, rows, dtype, pool, *width) for width in widths for name in LINEARS for rows in args.rows]
    cases += [linear_w8a8_case(name, rows, dtype, pool) for name in LINEARS for rows in args.rows]
    cases += [experts_case(rows, dtype, pool) for rows in args.rows]
    cases += [attention_case(*size, dtype, pool) for size in ((1, 512, 1), (1, 512, 8), (1, 8192, 1), (512, 512, 1), (512, 4096, 1))]
    sizes = ((1, 2000, 1, 128), (1, 2000, 8, 128), (512, 2000, 1, 128), (1, 2000, 1, 64), (512, 2000, 1, 64))
    cases += [attention_case(new, kv, many, dtype, pool, policy, dim) for new, kv, many, dim in sizes for policy in KV_FORMATS]
    cases += small_cases(1, dtype) + small_cases(512, dtype)
    for case in cases:
        if args.only in case.name:
            mine = seconds_per_call(case, kernels, args.seconds)
            show(case, mine, None if args.no_torch else seconds_per_call(case, REFERENCE, args.seconds), ceilings)


if __name__ == "__main__":
    main()
