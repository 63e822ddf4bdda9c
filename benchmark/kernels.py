"""Each kernel next to the ceiling measured in the same run, and on a CPU next to torch: `python -m benchmark.kernels`.

Shapes of InternLM2.5-1.8B (a) or 7B (b). Weights and caches rotate over more than a gigabyte, so that they come from memory as in a decode step,
not from a cache. A row's percentage is against the nearer of the two limits: bytes / read bandwidth or flops / matmul rate. On a CUDA device a case is a
CUDA graph of calls with data of their own, and a kernel may begin before the one before has ended, as in a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmark import common
from lmdeploy.engine.sampler import SamplingTable
from lmdeploy.inputs import AttentionMeta
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.build import NativeBuild, load_native
from lmdeploy.kernels.cpu import native_kernels, read_bandwidth
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kernels.select import select, token_kernel
from lmdeploy.kv_layer import KVFormat, KVLayer
from lmdeploy.messages import SamplingParams

Tensor = torch.Tensor
KV_HEADS, HEAD_DIM, BLOCK_SIZE, VOCAB = 8, 128, 64, 92544
BYTES_TO_ROTATE = 1_200_000_000
#: calls of a CUDA graph at most
CALLS = 64
KV_FORMATS = {"16": KVFormat(), "8": KVFormat("8", "8"), "k8v4": KVFormat("8", "4", rotated=True), "4": KVFormat("4", "4", rotated=True)}
CUDA_FORMATS = {**KV_FORMATS, "fp8": KVFormat("fp8", "fp8")}


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model's."""

    hidden: int
    heads: int
    inter: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of its matrices."""
        qkv = (self.heads + 2 * KV_HEADS) * HEAD_DIM
        return {
            "qkv": (self.hidden, qkv),
            "o": (self.heads * HEAD_DIM, self.hidden),
            "gate_up": (self.hidden, 2 * self.inter),
            "down": (self.inter, self.hidden),
            "head": (self.hidden, VOCAB),
        }


SHAPES = {"a": Sizes(2048, 16, 8192), "b": Sizes(4096, 32, 14336)}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size: `run(i)` works on the i-th of `copies` sets of data."""

    name: str
    nbytes: float
    flops: float
    copies: int
    run: Callable[[Kernels, int], object]
    captured: bool = True  # whether a CUDA graph can hold it


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


def device_seconds_per_call(case: Case, kernels: Kernels) -> float:
    """The same on a CUDA device: of all calls of a graph, the median of five replays; launched one by one where a graph cannot hold them."""
    calls = min(case.copies, CALLS) if case.copies > 1 else CALLS // 4
    runs = [partial(case.run, kernels, i % case.copies) for i in range(calls)]
    return common.cuda_seconds_per_call(runs) if case.captured else common.cuda_seconds(lambda: [run() for run in runs]) / calls


def linear_case(sizes: Sizes, name: str, rows: int, dtype: torch.dtype, pool: Tensor) -> Case:
    """One matrix of the model times `rows` rows; distinct weights are cut from `pool`."""
    inner, outer = sizes.linears[name]
    copies = max(1, pool.numel() // (inner * outer))
    weights = pool[: copies * inner * outer].view(copies, outer, inner)
    x, out = torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype)
    nbytes = (inner * outer + rows * (inner + outer)) * dtype.itemsize
    return Case(f"linear {name} T={rows}", nbytes, 2.0 * rows * inner * outer, copies, lambda k, i: k.linear(x, weights[i], None, out))


def linear_silu_case(sizes: Sizes, rows: int, dtype: torch.dtype, pool: Tensor) -> Case:
    """Gate and up with SiLU behind."""
    inner, outer = sizes.linears["gate_up"]
    copies = max(1, pool.numel() // (inner * outer))
    weights = pool[: copies * inner * outer].view(copies, outer, inner)
    x, both, out = torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype), torch.empty(rows, outer // 2, dtype=dtype)
    nbytes = (inner * outer + rows * (inner + outer // 2)) * dtype.itemsize
    return Case(f"linear_silu gate_up T={rows}", nbytes, 2.0 * rows * inner * outer, copies, lambda k, i: k.linear_silu(x, weights[i], None, both, out))


def linear_w4_case(sizes: Sizes, name: str, rows: int, dtype: torch.dtype, pool: Tensor, group: int = 128) -> Case:
    """The same with 4-bit weights; codes are cut from the bytes of `pool`, groups of `group` inputs."""
    inner, outer = sizes.linears[name]
    raw, half, groups = pool.view(torch.uint8), inner * outer // 2, outer * inner // group
    copies = max(1, raw.numel() // (half + 3 * groups))
    codes = raw[: copies * half].view(copies, outer, inner // 2)
    scales, zeros = torch.rand(copies, outer, inner // group).half(), torch.randint(0, 16, (copies, outer, inner // group), dtype=torch.uint8)
    x, out = torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype)
    nbytes = half + 3 * groups + rows * (inner + outer) * dtype.itemsize

    def run(kernels: Kernels, i: int) -> None:
        kernels.linear_w4(x, codes[i], scales[i], zeros[i], None, out)

    return Case(f"linear_w4 {name} T={rows}", nbytes, 2.0 * rows * inner * outer, copies, run)


def linear_w8_case(sizes: Sizes, name: str, rows: int, dtype: torch.dtype, pool: Tensor, width: torch.dtype, group: int = 0) -> Case:
    """The same with 8-bit weights; `group` inputs share a scale, 0: all of a row."""
    inner, outer = sizes.linears[name]
    copies = max(1, pool.nbytes // (inner * outer))
    codes = pool.view(torch.uint8)[: copies * inner * outer].view(width).view(copies, outer, inner)
    scales = torch.rand(copies, outer, inner // (group or inner))
    x, out = torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype)
    nbytes = inner * outer + scales[0].nbytes + rows * (inner + outer) * dtype.itemsize
    kind = f"{'int8' if width is torch.int8 else 'fp8'}{f' g{group}' if group else ''}"
    return Case(f"linear_w8 {kind} {name} T={rows}", nbytes, 2.0 * rows * inner * outer, copies, lambda k, i: k.linear_w8(x, codes[i], scales[i], None, out))


def linear_w8a8_case(sizes: Sizes, name: str, rows: int, dtype: torch.dtype, pool: Tensor, width: torch.dtype = torch.int8) -> Case:
    """8-bit weights with activations quantised on the way; the matmul ceiling is still that of bfloat16."""
    inner, outer = sizes.linears[name]
    copies = max(1, pool.nbytes // (inner * outer))
    codes = pool.view(torch.uint8)[: copies * inner * outer].view(width).view(copies, outer, inner)
    scales, x, out = torch.rand(copies, outer, 1), torch.randn(rows, inner).to(dtype), torch.empty(rows, outer, dtype=dtype)
    nbytes = inner * outer + 4 * outer + rows * (inner + outer) * dtype.itemsize
    kind = "int8" if width is torch.int8 else "fp8"
    return Case(
        f"linear_w8a8 {kind} {name} T={rows}", nbytes, 2.0 * rows * inner * outer, copies, lambda k, i: k.linear_w8a8(x, codes[i], scales[i], None, out)
    )


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
    fmt, raw = CUDA_FORMATS[policy], pool.view(torch.uint8)
    nbytes = fmt.layer_bytes(blocks, KV_HEADS, BLOCK_SIZE, head_dim, dtype)
    copies = max(1, raw.numel() // nbytes)
    layers = [fmt.layer(raw[i * nbytes : (i + 1) * nbytes], blocks, KV_HEADS, BLOCK_SIZE, head_dim, dtype) for i in range(copies)]
    for scales in (part for layer in layers for part in (layer.key_scales, layer.value_scales) if part is not None):
        scales.uniform_(0.005, 0.01)
    return layers


def attention_case(
    heads: int, query_len: int, kv_len: int, sequences: int, dtype: torch.dtype, pool: Tensor, policy: str = "16", head_dim: int = HEAD_DIM
) -> Case:
    """Equal sequences over a shuffled cache; the caches of different layers are cut from `pool`."""
    per_sequence = (kv_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    blocks, rows = per_sequence * sequences, query_len * sequences
    layers = cut_caches(policy, blocks, head_dim, dtype, pool)
    q, out = torch.randn(rows, heads, head_dim).to(dtype), torch.empty(rows, heads * head_dim, dtype=dtype)
    k, v = torch.randn(2, rows, KV_HEADS, head_dim).to(dtype)
    table = torch.randperm(blocks).int().view(sequences, per_sequence)
    start = torch.arange(0, rows + 1, query_len, dtype=torch.int32)
    lens = [kv_len] * sequences
    decodes = sequences if query_len == 1 else 0
    meta = AttentionMeta(start, torch.tensor(lens, dtype=torch.int32), table, torch.empty(0, dtype=torch.int64), [query_len] * sequences, lens, decodes)
    pairs = sequences * (query_len * (kv_len - query_len) + query_len * (query_len + 1) / 2)
    nbytes = sequences * kv_len * KV_HEADS * CUDA_FORMATS[policy].bytes_per_row(head_dim, dtype) + 2 * rows * heads * head_dim * dtype.itemsize
    scale = head_dim**-0.5

    def run(kernels: Kernels, i: int) -> None:
        kernels.attention(q, k, v, layers[i], meta, scale, 0, out)

    name = f"attention kv{policy} D={head_dim} B={sequences} new={query_len} kv={kv_len}"
    return Case(
        name, nbytes, 4.0 * pairs * heads * head_dim, len(layers), run, captured=query_len < kv_len
    )  # whole prompts go to a library that plans for each length


def decode_case(heads: int, kv_len: int, sequences: int, dtype: torch.dtype, pool: Tensor, policy: str) -> Case:
    """A decode step's attention with rotation and cache write in the launch."""
    per_sequence = (kv_len + BLOCK_SIZE - 1) // BLOCK_SIZE
    layers = cut_caches(policy, per_sequence * sequences, HEAD_DIM, dtype, pool)
    table = torch.randperm(per_sequence * sequences).int().view(sequences, per_sequence)
    slots = table[:, (kv_len - 1) // BLOCK_SIZE].long() * BLOCK_SIZE + (kv_len - 1) % BLOCK_SIZE
    lens = [kv_len] * sequences
    meta = AttentionMeta(torch.arange(sequences + 1, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32), table, slots, [1] * sequences, lens, sequences)
    qkv, out = torch.randn(sequences, heads + 2 * KV_HEADS, HEAD_DIM).to(dtype), torch.empty(sequences, heads * HEAD_DIM, dtype=dtype)
    q, k, v = qkv.split([heads, KV_HEADS, KV_HEADS], 1)
    angles = torch.randn(sequences, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()

    def run(kernels: Kernels, i: int) -> None:
        assert kernels.rope_attention is not None
        kernels.rope_attention(q, k, v, cos, sin, None, layers[i], meta, HEAD_DIM**-0.5, 0, out)

    nbytes = sequences * kv_len * KV_HEADS * CUDA_FORMATS[policy].bytes_per_row(HEAD_DIM, dtype) + qkv.nbytes + out.nbytes
    return Case(f"rope_attention kv{policy} B={sequences} kv={kv_len}", nbytes, 4.0 * sequences * kv_len * heads * HEAD_DIM, len(layers), run)


DRAWS: dict[str, dict[str, float]] = {
    "greedy": {},
    "top-k, top-p": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "top-p": {"temperature": 0.8, "top_p": 0.8},
}


def choose_case(rows: int, dtype: torch.dtype, kind: str, known: int = 0) -> Case:
    """The choice of a token of each row, by the kernel that a step has. `kind`: of DRAWS, seeded. `known`: penalties are looked for, over so many tokens of each
    row; with 0 no row has any."""
    kernel = token_kernel("cuda")
    assert kernel is not None
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.1} if known else {}
    with torch.device("cpu"):  # where the table keeps its own
        table = SamplingTable(rows, VOCAB, torch.device("cuda"))
        for slot in range(rows):
            table.set(slot, SamplingParams(max_new_tokens=9, seed=1, **DRAWS[kind], **penalties), max(known // 2, 1))
        table.refresh()
    length = max(known, 1)
    logits, slots, lengths = torch.randn(4, rows, VOCAB).to(dtype), torch.arange(rows), torch.full((rows,), length)
    tokens_of, tokens = torch.randint(VOCAB, (rows + 1, length + 3)).int(), torch.empty(rows, dtype=torch.int64)
    scratch = torch.zeros(rows + 1, kernel.scratch_width, dtype=torch.int64)
    edits = torch.zeros(rows, VOCAB, dtype=torch.int32)

    def run(_: Kernels, i: int) -> None:
        kernel.choose(logits[i], slots, lengths, table.columns, None, tokens_of, tokens, slots, scratch, edits)

    name = f" penalties of {known}" if known else ""
    return Case(f"choose_tokens {kind} S={rows}{name}", logits[0].nbytes + (4 * rows * VOCAB if known else 0), 0, 4, run)


def memory_of(fmt: KVFormat, blocks: int, dtype: torch.dtype) -> Tensor:
    """Zeros for the cache of one layer."""
    return torch.zeros(fmt.layer_bytes(blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype), dtype=torch.uint8)


def write_kv(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: KVLayer, kernels: Kernels, _: int) -> None:
    """One call of rope_write_kv."""
    kernels.rope_write_kv(q, k, v, cos, sin, None, cache, slots)


def small_cases(sizes: Sizes, rows: int, dtype: torch.dtype) -> list[Case]:
    """Norms, SiLU and rope: their data was just written by the step, so it is in cache and is not rotated."""
    x, residual, weight = torch.randn(rows, sizes.hidden).to(dtype), torch.randn(rows, sizes.hidden).to(dtype), torch.ones(sizes.hidden, dtype=dtype)
    out, both, mixed = torch.empty_like(x), torch.randn(rows, 2 * sizes.inter).to(dtype), torch.empty(rows, sizes.inter, dtype=dtype)
    qkv = torch.randn(rows, sizes.heads + 2 * KV_HEADS, HEAD_DIM).to(dtype)
    q, k, v = qkv[:, : sizes.heads], qkv[:, sizes.heads : sizes.heads + KV_HEADS], qkv[:, sizes.heads + KV_HEADS :]
    angles, slots = torch.randn(rows, HEAD_DIM // 2), torch.randperm(rows + BLOCK_SIZE)[:rows]
    cos, sin = angles.cos(), angles.sin()
    blocks = rows // BLOCK_SIZE + 2
    caches = {policy: fmt.layer(memory_of(fmt, blocks, dtype), blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM, dtype) for policy, fmt in KV_FORMATS.items()}
    return [
        Case(f"rms_norm T={rows}", 2.0 * x.nbytes, 0, 1, lambda kernels, _: kernels.rms_norm(x, weight, 1e-5, out)),
        Case(f"add_rms_norm T={rows}", 4.0 * x.nbytes, 0, 1, lambda kernels, _: kernels.add_rms_norm(x, residual, weight, 1e-5, out)),
        Case(f"silu_mul T={rows}", 1.5 * both.nbytes, 0, 1, lambda kernels, _: kernels.silu_mul(both, mixed)),
        *(
            Case(f"rope_write_kv kv{policy} T={rows}", 2.0 * qkv.nbytes, 0, 1, partial(write_kv, q, k, v, cos, sin, slots, cache))
            for policy, cache in caches.items()
        ),
    ]


def cpu_ceilings(build: NativeBuild, pool: Tensor, threads: int) -> common.Ceilings:
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
    print(f"{case.name:<44}{seconds * 1e6:10.1f} us {rates} floor {floor * 1e6:10.1f} us {100 * floor / seconds:6.0f} % {peer}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA, if there is a device")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="a", help="a: InternLM2.5-1.8B, b: 7B (default a)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", help="rows of the linear layers (default on a CPU 1 2 4 8 16 32 512, on CUDA 1 8 64 256 4096)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.4, help="time for one figure, on a CPU")
    parser.add_argument("--no-torch", action="store_true", help="do not measure torch beside it, on a CPU")
    return parser.parse_args()


def linear_cases(sizes: Sizes, rows: list[int], dtype: torch.dtype, pool: Tensor) -> Iterator[Case]:
    """Products in all formats, and experts."""
    every = [(name, count) for name in sizes.linears for count in rows]
    yield from (linear_case(sizes, name, count, dtype, pool) for name, count in every)
    yield from (linear_silu_case(sizes, count, dtype, pool) for count in rows)
    yield from (linear_w4_case(sizes, name, count, dtype, pool) for name, count in every)
    for width in ((torch.int8, 0), (torch.float8_e4m3fn, 0), (torch.float8_e4m3fn, 128)):
        yield from (linear_w8_case(sizes, name, count, dtype, pool, *width) for name, count in every)
    yield from (linear_w8a8_case(sizes, name, count, dtype, pool) for name, count in every)
    yield from (experts_case(count, dtype, pool) for count in rows)


def cpu_cases(sizes: Sizes, rows: list[int], dtype: torch.dtype, pool: Tensor) -> Iterator[Case]:
    """What a CPU is asked."""
    yield from linear_cases(sizes, rows, dtype, pool)
    yield from (attention_case(sizes.heads, *size, dtype, pool) for size in ((1, 512, 1), (1, 512, 8), (1, 8192, 1), (512, 512, 1), (512, 4096, 1)))
    for new, kv, many, dim in ((1, 2000, 1, 128), (1, 2000, 8, 128), (512, 2000, 1, 128), (1, 2000, 1, 64), (512, 2000, 1, 64)):
        yield from (attention_case(sizes.heads, new, kv, many, dtype, pool, policy, dim) for policy in KV_FORMATS)
    yield from small_cases(sizes, 1, dtype)
    yield from small_cases(sizes, 512, dtype)


def cuda_cases(sizes: Sizes, rows: list[int], dtype: torch.dtype, pool: Tensor) -> Iterator[Case]:
    """What a CUDA device is asked."""
    yield from linear_cases(sizes, rows, dtype, pool)
    yield from (linear_w8a8_case(sizes, name, count, dtype, pool, torch.float8_e4m3fn) for name in sizes.linears for count in rows)
    for policy in CUDA_FORMATS:
        yield from (decode_case(sizes.heads, kv, many, dtype, pool, policy) for kv, many in ((256, 1), (2000, 1), (256, 64), (2000, 64)))
        yield attention_case(sizes.heads, 512, 4096, 1, dtype, pool, policy)
    yield attention_case(sizes.heads, 4096, 4096, 1, dtype, pool)
    for count in (1, 64, 4096):
        yield from small_cases(sizes, count, dtype)
    yield from (choose_case(count, dtype, kind, known) for count in (1, 64, 256) for kind in DRAWS for known in (0, 500, 4000))


def on_cuda(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Measure the kernels that an engine on a CUDA device has."""
    sizes, ceilings = SHAPES[args.shape], common.measure_ceilings("cuda")
    kernels = select("turbomind", "cuda", dtype, head_dim=HEAD_DIM)
    print(
        f"{args.dtype}, shape {args.shape}; {common.machine()}\nceilings of this run: read {ceilings.read_gbs:.0f} GB/s, {ceilings.bf16_gflops / 1e3:.0f} TFLOP/s in bfloat16"
    )
    with torch.device("cuda"), torch.inference_mode():
        pool = torch.empty(BYTES_TO_ROTATE // dtype.itemsize, dtype=dtype).uniform_(-1, 1)
        for case in cuda_cases(sizes, args.rows or [1, 8, 64, 256, 4096], dtype, pool):
            if args.only in case.name:
                show(case, device_seconds_per_call(case, kernels), None, ceilings)
            del case  # its data, before the next one's


def on_cpu(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Measure the native kernels, and torch beside them."""
    torch.set_num_threads(args.threads)
    build = load_native()
    if build.library is None:
        raise SystemExit(f"no native kernels here: {build.reason}")
    kernels = native_kernels(build, args.threads)
    pool = torch.empty(BYTES_TO_ROTATE // dtype.itemsize, dtype=dtype).uniform_(-1, 1)
    ceilings = cpu_ceilings(build, pool, args.threads)
    print(f"{args.dtype}, {args.threads} threads, native {build.variant}; others keep {common.busy_cores():.2f} cores busy")
    print(f"ceilings of this run: read {ceilings.read_gbs:.1f} GB/s, torch matmul {ceilings.bf16_gflops:.0f} GFLOP/s; last column: times as fast as torch")
    for case in cpu_cases(SHAPES[args.shape], args.rows or [1, 2, 4, 8, 16, 32, 512], dtype, pool):
        if args.only in case.name:
            mine = seconds_per_call(case, kernels, args.seconds)
            show(case, mine, None if args.no_torch else seconds_per_call(case, REFERENCE, args.seconds), ceilings)


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.manual_seed(0)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device here; --device cpu measures the CPU kernels")
    (on_cuda if device == "cuda" else on_cpu)(args, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
