"""4-bit products on CUDA next to cuBLAS's 16-bit ones: `python -m benchmark.linear_w4`.

The linear layers of InternLM2.5-1.8B (a) and 7B (b), group 128, bfloat16. Every call of a CUDA graph has weights of its own, more of them than the L2 cache
holds. The floor is the larger of bytes / read bandwidth and flops / matmul rate, both measured in the same run. `step` is the sum over
all layers, without the head.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmark import common
from lmdeploy.kernels.triton_kernels.linear_w4 import linear_w4

Tensor = torch.Tensor
GROUP = 128
#: outputs, inputs; and how many layers a model has
SHAPES = {
    "a": ({"qkv": (4096, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)}, 24),
    "b": ({"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}, 32),
}
#: bytes that calls of a graph read at least before a weight's turn comes again
ROTATED = 200 << 20


def weight(outer: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers, scales and zero points."""
    qweight = torch.randint(0, 256, (outer, inner // 2), dtype=torch.uint8, device="cuda")
    scales = (torch.rand(outer, inner // GROUP, device="cuda") * 0.01).half()
    return qweight, scales, torch.randint(0, 16, scales.shape, dtype=torch.uint8, device="cuda")


def measure(rows: int, outer: int, inner: int) -> tuple[float, float, int]:
    """(microseconds in 4 bits, in 16 bits, bytes of a 4-bit weight)."""
    x, out = torch.randn(rows, inner, device="cuda").bfloat16(), torch.empty(rows, outer, dtype=torch.bfloat16, device="cuda")
    first = weight(outer, inner)
    nbytes = sum(part.nbytes for part in first)
    weights = [first] + [weight(outer, inner) for _ in range(max(2, ROTATED // nbytes))]
    four = 1e6 * common.cuda_seconds_per_call([partial(linear_w4, x, *w, None, out) for w in weights])
    dense = [torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, ROTATED // (2 * outer * inner)))]
    return four, 1e6 * common.cuda_seconds_per_call([partial(torch.mm, x, w.t(), out=out) for w in dense]), nbytes


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.linear_w4", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 128, 1024, 4096])
    args = parser.parse_args()
    ceilings = common.measure_ceilings("cuda")
    table = [["shape", "rows", "us", "GB/s", "TFLOP/s", "floor us", "fraction", "cuBLAS 16 bit us"]]
    for name in args.shapes:
        shapes, layers = SHAPES[name]
        for rows in args.rows:
            total = [0.0, 0.0, 0.0]
            for layer, (outer, inner) in shapes.items():
                four, dense, nbytes = measure(rows, outer, inner)
                flops = 2.0 * rows * outer * inner
                floor = max(nbytes / ceilings.read_gbs / 1e3, flops / ceilings.bf16_gflops / 1e3)
                total = [total[0] + four * layers, total[1] + dense * layers, total[2] + floor * layers]
                rates = [f"{nbytes / four / 1e3:.0f}", f"{flops / four / 1e6:.0f}"]
                table.append([f"{name} {layer}", str(rows), f"{four:.2f}", *rates, f"{floor:.2f}", f"{floor / four:.0%}", f"{dense:.2f}"])
            table.append([f"{name} step", str(rows), f"{total[0]:.0f}", "", "", f"{total[2]:.0f}", f"{total[2] / total[0]:.0%}", f"{total[1]:.0f}"])
    print(f"\n{common.machine()}\nread {ceilings.read_gbs:.0f} GB/s, bf16 {ceilings.bf16_gflops / 1e3:.0f} TFLOP/s\n")
    common.print_table(table)


if __name__ == "__main__":
    main()
