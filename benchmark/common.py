"""What every benchmark shares: the machine's ceilings measured in the same run, floors from a model's facts, idleness, versions.

A floor is max(bytes that must be read / read bandwidth, flops / matmul rate): no correct program is much faster.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from lmdeploy.engine.engine import Engine
from lmdeploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine reached in this run."""

    read_gbs: float  # GB/s read by a float32 matrix-vector product
    bf16_gflops: float  # GFLOP/s of a large bfloat16 (float32 where that is faster) matmul


def timed(run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of `run` after one warm-up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def prepare_ahead(engine: Engine) -> str:
    """Get everything ready that an idle server would: CUDA graphs, and what comes without them; what that took, in words."""
    start, count = time.perf_counter(), 0
    while engine.prepare_ahead():
        count += 1
    return f"{count} steps made ready ahead in {time.perf_counter() - start:.2f} s"


def measure_ceilings(device: str = "auto") -> Ceilings:
    """Read bandwidth and the bfloat16 matmul rate of a device (auto: CUDA if there is one): over 8 GiB and 8192^3 there, 1 GiB and 4096^3 on a CPU."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return _cuda_ceilings()
    read = _read_bandwidth()
    a = torch.randn(4096, 4096).to(torch.bfloat16)
    rate = 2 * 4096**3 / timed(lambda: torch.mm(a, a), 3) / 1e9
    return Ceilings(read, rate)


def _cuda_ceilings() -> Ceilings:
    big = torch.ones(1 << 31, dtype=torch.float32, device="cuda")
    read = big.nbytes / min(cuda_seconds(big.sum), cuda_seconds(big.amax)) / 1e9
    del big
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return Ceilings(read, 2 * 8192**3 / cuda_seconds(lambda: torch.mm(a, a), 10) / 1e9)


def cuda_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of `run` on the device, after one warm-up."""
    run()
    seconds = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def cuda_seconds_per_call(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one of the calls, all of them as a CUDA graph: the median of five replays."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())  # which may still be filling what they read
    with torch.cuda.stream(side):
        calls[0]()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for call in calls:
            call()
    return cuda_seconds(graph.replay) / len(calls)


def _read_bandwidth() -> float:
    big, vector = torch.ones(1 << 15, 1 << 13), torch.ones(1 << 13)  # 1 GiB of float32
    return big.nbytes / timed(lambda: torch.mv(big, vector)) / 1e9


#: What a folder of 4-bit weights says of them, for `--random-weights --model-format NAME` of a folder that has 16-bit ones
FOUR_BITS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
}


def overrides(spec: ModelSpec, model_format: str | None, *, random_weights: bool) -> dict[str, Any] | None:
    """`hf_overrides` of a run: a folder of a 16-bit model serves for random 4-bit weights too."""
    invented = random_weights and not spec.quantization and model_format in FOUR_BITS
    return {"quantization_config": FOUR_BITS[str(model_format)]} if invented else None


def busy_cores(seconds: float = 0.5) -> float:
    """Cores that other processes keep busy right now (Linux): above 0.2 spoils a two-thread figure."""

    def reading() -> tuple[float, float]:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields), fields[3] + fields[4]

    total, idle = reading()
    time.sleep(seconds)
    total2, idle2 = reading()
    return (os.cpu_count() or 1) * (1 - (idle2 - idle) / max(total2 - total, 1))


def wait_until_idle(limit: float = 60.0) -> float:
    """Wait up to `limit` seconds for an idle machine; returns the busy cores last seen."""
    end = time.monotonic() + limit
    while (busy := busy_cores()) > 0.15 and time.monotonic() < end:
        time.sleep(1)
    return busy


def linear_parameters(spec: ModelSpec) -> int:
    """Weights of all decoder layers that one token multiplies (head and embedding apart)."""
    qkv = spec.hidden_size * (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    out = spec.num_heads * spec.head_dim * spec.hidden_size
    if spec.num_experts:
        mlp = 3 * spec.hidden_size * spec.moe_intermediate_size * spec.experts_per_token + spec.hidden_size * spec.num_experts
    else:
        mlp = 3 * spec.hidden_size * spec.intermediate_size
    return spec.num_layers * (qkv + out + mlp)


def decode_floor(spec: ModelSpec, batch: int, context: int, width: int, ceilings: Ceilings, weight_bytes: int | None = None) -> float:
    """Seconds of one decode step: all weights and the batch's keys and values are read once. `width`: bytes a number.

    `weight_bytes`: what the weights of the layers and the head really take (quantised ones take less); default: all in `width`.
    """
    weights = linear_parameters(spec) + spec.vocab_size * spec.hidden_size
    kv = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * context * batch
    read = (weights * width if weight_bytes is None else weight_bytes) + kv * width
    return max(read / ceilings.read_gbs / 1e9, 2 * weights * batch / ceilings.bf16_gflops / 1e9)


def read_each_step(spec: ModelSpec, weight_bytes: int, width: int) -> int | None:
    """What a step reads of the loaded weights: all but the embedding table, where that is not the head too. None where idle experts are not read."""
    table = 0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size * width
    return None if spec.num_experts else weight_bytes - table


def prefill_floor(spec: ModelSpec, tokens: int, ceilings: Ceilings) -> float:
    """Seconds of a prompt of `tokens`: matmul and causal attention flops at the matmul rate; logits of the last token only."""
    attention = 2 * spec.num_layers * spec.num_heads * spec.head_dim * tokens * tokens  # 4 * T^2 / 2 for QK and PV
    flops = 2 * linear_parameters(spec) * tokens + attention + 2 * spec.vocab_size * spec.hidden_size
    return flops / ceilings.bf16_gflops / 1e9


def machine() -> str:
    """CPU, cores, versions and date on one line, for RESULTS.md."""
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor()
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model} x {os.cpu_count()}{gpu}; python {platform.python_version()}, torch {torch.__version__}; {date.today().isoformat()}"


def print_table(rows: list[list[str]]) -> None:
    """Rows as a Markdown table; the first is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def describe(spec: ModelSpec) -> str:
    """The shape in one line."""
    facts = dataclasses.asdict(spec)
    return f"{spec.architecture} " + ", ".join(
        f"{k} {facts[k]}" for k in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size")
    )
