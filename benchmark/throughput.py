"""Offline throughput of many requests at once: `python -m benchmark.throughput MODEL`.

The length mix of a chat service (lognormal, see --lengths), all submitted at once, greedy, end-of-sequence ignored, token ids in and
out. Prints requests/s, output and total tokens/s, the floor of the same work, and peak memory.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from tqdm import tqdm

from benchmark import common, mix
from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.config import PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.start import build_engine
from lmdeploy.messages import EngineRequest, SamplingParams
from lmdeploy.spec import ModelSpec, load_spec


def floor_seconds(spec: ModelSpec, pairs: list[tuple[int, int]], width: int, ceilings: common.Ceilings, slots: int, weight_bytes: int | None = None) -> float:
    """All prompts at the matmul rate, plus decode steps: at each, the weights and the live sequences' keys are read once."""
    prefill = sum(common.prefill_floor(spec, i, ceilings) for i, _ in pairs)
    decode = 0.0
    for position in range(max(o for _, o in pairs)):
        live = [i + position for i, o in pairs if o > position]
        for start in range(0, len(live), slots):
            group = live[start : start + slots]
            decode += common.decode_floor(spec, len(group), sum(group) // len(group), width, ceilings, weight_bytes)
    return prefill + decode


def run(engine: Engine, spec: ModelSpec, pairs: list[tuple[int, int]], first_id: int = 1) -> float:
    """Seconds until every request is answered."""
    top = min(mix.TOP_ID, spec.vocab_size - 1)
    start = time.perf_counter()
    for n, (length, new_tokens) in enumerate(pairs):
        ids = mix.prompt(n, length, top)
        engine.add(EngineRequest(request_id=first_id + n, token_ids=ids, sampling=SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)))
    with tqdm(total=len(pairs), desc="requests") as bar:
        while engine.has_work:
            bar.update(sum(o.finish_reason is not None for o in engine.step().others))
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.throughput", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="model folder or hub id; default: the embedded model")
    parser.add_argument("--random-weights", action="store_true", help="the folder needs only a config.json; weights are random")
    parser.add_argument("--backend", choices=("turbomind", "pytorch"), default="turbomind")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--requests", type=int, default=128, help="number of requests (default 128)")
    parser.add_argument("--lengths", help="JSON file with the lists `input` and `output`")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths by this (a quick run)")
    parser.add_argument("--seed", type=int, default=mix.SEED)
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--quant-policy", default="0", help="KV cache: 0, 8, k8v4, 4 or, on CUDA, 16 for fp8 (default 0)")
    parser.add_argument("--head-bits", type=int, choices=(16, 8, 4), default=16, help="bits of the output head (default 16)")
    parser.add_argument(
        "--model-format", help="weight layout, as the engine's option; awq and gptq with --random-weights: random 4-bit weights of groups of 128"
    )
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    busy = common.wait_until_idle()
    folder = resolve_model(args.model, None, None)
    spec, pairs = load_spec(folder, None), mix.lengths(args.lengths, args.requests, seed=args.seed, shrink=args.shrink)
    ceilings = common.measure_ceilings()
    config_class = TurbomindEngineConfig if args.backend == "turbomind" else PytorchEngineConfig
    longest = max(i + o for i, o in pairs) + 1
    config = config_class(
        dtype=args.dtype,
        session_len=longest,
        max_batch_size=args.max_batch_size,
        cache_max_entry_count=min(args.max_batch_size * (longest // 64 + 2), sum((i + o) // 64 + 3 for i, o in pairs)),
        enable_prefix_caching=False,
        random_weights=args.random_weights,
        head_bits=args.head_bits,
        quant_policy=args.quant_policy,
        model_format=args.model_format,
        hf_overrides=common.overrides(spec, args.model_format, random_weights=args.random_weights),
    )
    engine = build_engine(folder, config)
    ahead = common.prepare_ahead(engine)
    run(engine, spec, pairs[:2])
    seconds = run(engine, spec, pairs, 1000)
    width = torch.finfo(getattr(torch, engine.info.dtype)).bits // 8
    floor = floor_seconds(spec, pairs, width, ceilings, args.max_batch_size, common.read_each_step(spec, engine.info.memory.weights, width))
    inputs, outputs = sum(i for i, _ in pairs), sum(o for _, o in pairs)
    how = f"{engine.info.dtype}, {args.backend}, weights {args.model_format or 'as stored'}, head {args.head_bits} bit, KV {args.quant_policy}"
    print(f"\n{common.describe(spec)}; {how}\n{common.machine()}")
    print(
        f"ceilings of this run: read {ceilings.read_gbs:.1f} GB/s, bf16 matmul {ceilings.bf16_gflops:.0f} GFLOP/s; others kept {busy:.2f} cores busy at the start; {ahead}\n"
    )
    common.print_table(
        [
            ["requests", "input", "output", "seconds", "floor s", "fraction", "req/s", "output tok/s", "total tok/s", "peak GB"],
            [str(len(pairs)), str(inputs), str(outputs), f"{seconds:.2f}", f"{floor:.2f}", f"{floor / seconds:.0%}", f"{len(pairs) / seconds:.2f}"]
            + [f"{outputs / seconds:.1f}", f"{(inputs + outputs) / seconds:.1f}", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f}"],
        ]
    )
    engine.close()


if __name__ == "__main__":
    main()
