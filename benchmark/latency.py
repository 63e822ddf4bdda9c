"""Prefill and decode speed of one model, next to the machine's floor: `python -m benchmark.latency MODEL`.

Token ids in, token ids out, greedy, end-of-sequence ignored, prefix cache off. With --random-weights MODEL is a folder with a
config.json. With --peer transformers the same shape is measured in transformers, in the same run.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmark import common
from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.config import EngineConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.start import build_engine
from lmdeploy.messages import EngineRequest, SamplingParams
from lmdeploy.spec import ModelSpec, load_spec


@dataclass(frozen=True, slots=True)
class Figures:
    """Tokens per second; decode by batch size."""

    prefill: float
    decode: dict[int, float]


def prompts(spec: ModelSpec, batch: int, length: int) -> list[list[int]]:
    """Prompt i of the benchmark: seeded random ids, the same for every engine."""
    top = min(90000, spec.vocab_size - 1)
    return [np.random.default_rng(1000003 + i).integers(min(100, top // 2), top, length).tolist() for i in range(batch)]


def run_batch(engine: Engine, inputs: list[list[int]], new_tokens: int, first_id: int) -> tuple[float, float]:
    """(seconds to every first token, seconds to the last token) of a batch submitted at once."""
    start = time.perf_counter()
    for i, ids in enumerate(inputs):
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        engine.add(EngineRequest(request_id=first_id + i, token_ids=ids, sampling=sampling))
    waiting, first = len(inputs), 0.0
    seen: set[int] = set()
    while engine.has_work:
        for output in engine.step().others:  # with the first and last output of each
            if output.error:
                raise RuntimeError(output.error)
            seen.add(output.request_id)
        if not first and len(seen) == waiting:
            first = time.perf_counter() - start
    return first, time.perf_counter() - start


def measure(engine: Engine, spec: ModelSpec, args: argparse.Namespace) -> Figures:
    """Medians over args.repeat runs."""
    ids, seconds = 1, []
    long = prompts(spec, 1, args.prompt)
    for _ in range(args.repeat + 1):
        seconds.append(run_batch(engine, long, 1, ids)[1])
        ids += 1
    prefill = args.prompt / statistics.median(seconds[1:])
    decode = {}
    for batch in args.batch:
        rates = []
        ids += batch
        run_batch(engine, prompts(spec, batch, args.decode_prompt), args.new_tokens, ids)  # kernels are compiled and graphs captured
        ids += batch
        for _ in range(args.repeat):
            first, last = run_batch(engine, prompts(spec, batch, args.decode_prompt), args.new_tokens, ids)
            ids += batch
            rates.append(batch * (args.new_tokens - 1) / (last - first))
        decode[batch] = statistics.median(rates)
    return Figures(prefill, decode)


def measure_transformers(spec: ModelSpec, dtype: torch.dtype, args: argparse.Namespace) -> Figures:
    """The same cases in transformers: a llama of the same shape with random weights, sdpa attention, its own cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position,
        tie_word_embeddings=spec.tie_embeddings,
    )
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to_empty(device="cpu").eval()
        for parameter in model.parameters():
            parameter.data.uniform_(-0.02, 0.02)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers were emptied with the rest
    finally:
        torch.set_default_dtype(torch.float32)

    def generate(batch: int, length: int, new_tokens: int) -> float:
        ids = torch.tensor(prompts(spec, batch, length))
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        return time.perf_counter() - start

    with torch.inference_mode():
        prefill = args.prompt / statistics.median([generate(1, args.prompt, 1) for _ in range(args.repeat + 1)][1:])
        decode = {}
        for batch in args.batch:
            rates = []
            for _ in range(args.repeat):
                once = generate(batch, args.decode_prompt, 1)
                rates.append(batch * (args.new_tokens - 1) / (generate(batch, args.decode_prompt, args.new_tokens) - once))
            decode[batch] = statistics.median(rates)
    return Figures(prefill, decode)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.latency", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="model folder or hub id; default: the embedded model")
    parser.add_argument("--random-weights", action="store_true", help="the folder needs only a config.json; weights are random")
    parser.add_argument("--backend", choices=("turbomind", "pytorch"), default="turbomind")
    parser.add_argument("--eager-mode", action="store_true", help="no CUDA graphs")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prefill case (default 512)")
    parser.add_argument("--decode-prompt", type=int, default=32, help="prompt tokens of the decode cases (default 32)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens generated in the decode cases (default 32)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default 1 8)")
    parser.add_argument("--repeat", type=int, default=3, help="runs per case; the median counts (default 3)")
    parser.add_argument("--head-bits", type=int, choices=(16, 8, 4), default=16, help="bits of the output head (default 16)")
    parser.add_argument("--quant-policy", default="0", help="KV cache: 0, 8, k8v4 or 4 (default 0)")
    parser.add_argument(
        "--model-format", help="weight layout, as the engine's option; awq and gptq with --random-weights: random 4-bit weights of groups of 128"
    )
    parser.add_argument("--peer", choices=("transformers",), help="measure a peer in the same run (needs the test extra)")
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    args = parse()
    busy = common.wait_until_idle()
    folder: Path = resolve_model(args.model, None, None)
    config_class: type[EngineConfig] = TurbomindEngineConfig if args.backend == "turbomind" else PytorchEngineConfig
    longest = max(args.prompt, args.decode_prompt) + args.new_tokens + 1
    spec = load_spec(folder, None)
    ceilings = common.measure_ceilings()
    start = time.perf_counter()
    blocks = max(max(args.batch) * ((args.decode_prompt + args.new_tokens) // 64 + 2), longest // 64 + 2)
    config = config_class(
        dtype=args.dtype,
        session_len=min(longest, spec.max_position),
        max_batch_size=max(args.batch),
        cache_max_entry_count=blocks,
        enable_prefix_caching=False,
        eager_mode=args.eager_mode,
        random_weights=args.random_weights,
        head_bits=args.head_bits,
        quant_policy=args.quant_policy,
        model_format=args.model_format,
        hf_overrides=common.overrides(spec, args.model_format, random_weights=args.random_weights),
    )
    engine = build_engine(folder, config)
    loaded = time.perf_counter() - start
    ahead = common.prepare_ahead(engine)
    ours = measure(engine, spec, args)
    info = engine.info
    engine.close()
    del engine
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    peer = measure_transformers(spec, getattr(torch, info.dtype), args) if args.peer else None
    width = torch.finfo(getattr(torch, info.dtype)).bits // 8
    how = f"{info.dtype}, {args.backend}, weights {args.model_format or 'as stored'}, head {args.head_bits} bit, KV {args.quant_policy}"
    print(f"\n{common.describe(spec)}; {how}; weights {info.memory.weights / 1e9:.3f} GB\n{common.machine()}")
    print(
        f"ceilings of this run: read {ceilings.read_gbs:.1f} GB/s, bf16 matmul {ceilings.bf16_gflops:.0f} GFLOP/s; other processes kept {busy:.2f} cores busy at the start"
    )
    print(f"ready in {loaded:.2f} s, {ahead}, peak memory {peak:.2f} GB (RSS)\n")
    read = common.read_each_step(spec, info.memory.weights, width)
    floors = {f"prefill {args.prompt}": args.prompt / common.prefill_floor(spec, args.prompt, ceilings)}
    figures = {f"prefill {args.prompt}": (ours.prefill, peer and peer.prefill)}
    for batch in args.batch:
        floors[f"decode batch {batch}"] = batch / common.decode_floor(spec, batch, args.decode_prompt + args.new_tokens // 2, width, ceilings, read)
        figures[f"decode batch {batch}"] = (ours.decode[batch], peer and peer.decode[batch])
    rows = [["case", "tok/s", "floor", "fraction"] + (["transformers", "ratio"] if peer else [])]
    for case, (mine, theirs) in figures.items():
        row = [case, f"{mine:.2f}", f"{floors[case]:.2f}", f"{mine / floors[case]:.0%}"]
        rows.append(row + ([f"{theirs:.2f}", f"{mine / theirs:.2f}x"] if theirs else []))
    common.print_table(rows)


if __name__ == "__main__":
    main()
