"""Time and memory of the quantising commands: `python -m benchmark.quantise [--method awq --search] [--shape 7b | --model FOLDER]`.

A shape is a folder of random weights that is written on the spot (time does not depend on the numbers) with the embedded tokenizer; the command then runs as
a user's would, in this process. Bars: a 7B shape on one H200 in under 5 minutes with search; the embedded model on the CPU in under one.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmark import common
from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.checkpoint.writer import ShardWriter
from lmdeploy.lite import auto_awq, auto_gptq, smooth_quant
from lmdeploy.lite.report import Report, format_report
from lmdeploy.spec import ModelSpec, load_spec

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {  # Llama-2-7B, with the 92,544 tokens of InternLM2.5: its embeddings are the larger ones
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 92544, "max_position_embeddings": 4096,
    },
    "internlm2.5-7b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 92544, "max_position_embeddings": 32768, "rope_theta": 1e6,
    },
    "1.8b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8,
        "vocab_size": 92544, "max_position_embeddings": 32768, "rope_theta": 1e6,
    },
}  # fmt: skip


def tensor_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a llama checkpoint."""
    width, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    yield "model.embed_tokens.weight", (spec.vocab_size, width)
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        yield from ((f"{prefix}.{norm}.weight", (width,)) for norm in ("input_layernorm", "post_attention_layernorm"))
        for name, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (heads * dim, width)
        yield f"{prefix}.self_attn.o_proj.weight", (width, spec.num_heads * dim)
        yield from ((f"{prefix}.mlp.{name}_proj.weight", (inner, width)) for name in ("gate", "up"))
        yield f"{prefix}.mlp.down_proj.weight", (width, inner)
    yield from (("model.norm.weight", (width,)), ("lm_head.weight", (spec.vocab_size, width)))


def write_random_model(folder: Path, shape: dict[str, Any], device: str) -> Path:
    """A llama folder of that shape with normal random weights in bfloat16, and the embedded model's tokenizer."""
    spec = ModelSpec.from_config({**LLAMA, **shape})
    writer = ShardWriter(folder)
    generator = torch.Generator(device).manual_seed(0)
    for name, size in tensor_shapes(spec):
        tensor = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16) * 0.02
        writer.add(name, tensor.to(torch.bfloat16))
    writer.finish()
    embedded = resolve_model(None, None, None)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(embedded / name, writer.partial / name)
    (writer.partial / "config.json").write_text(json.dumps({**LLAMA, **shape}))
    writer.commit()
    return folder


def run(method: str, model: str | None, out: Path, args: argparse.Namespace) -> Report:
    """One command."""
    options: dict[str, Any] = {
        "work_dir": str(out), "calib_dataset": args.calib_dataset, "calib_samples": args.calib_samples, "calib_seqlen": args.calib_seqlen,
        "batch_size": args.batch_size, "eval_tokens": args.eval_tokens, "device": args.device,
    }  # fmt: skip
    if method == "gptq":
        return auto_gptq(model, **options)
    return (auto_awq if method == "awq" else smooth_quant)(model, search_scale=args.search, **options)


def print_result(method: str, report: Report, seconds: float, args: argparse.Namespace) -> None:
    """A table of one line, and where the time went."""
    layers = [layer["seconds"] for layer in report.layers]
    rounding = [layer["rounding_seconds"] for layer in report.layers]
    device = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() and args.device != "cpu" else "-"
    host = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    first = ["method", "model", "windows", "total s", "layers s", "a layer s", "of that rounding s", "host peak", "device peak"]
    windows = f"{report.samples} x {report.seqlen}"
    row = [method + (" search" if args.search else ""), args.model or args.shape, windows, f"{seconds:.1f}", f"{sum(layers):.1f}"]
    common.print_table([first, [*row, f"{statistics.median(layers):.2f}", f"{statistics.median(rounding):.2f}", host, device]])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.quantise", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="model folder or hub id; 'embedded' = the model that comes with lmdeploy")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="a folder of random weights, used without --model")
    parser.add_argument("--layers", type=int, help="so many layers instead of the shape's own")
    parser.add_argument("--method", choices=("awq", "gptq", "w8a8"), default="awq")
    parser.add_argument("--search", action="store_true", help="search scales and clipping")
    parser.add_argument("--calib-dataset", default="embedded")
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument("--calib-seqlen", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--eval-tokens", type=int, default=0, help="0: the proof (which loads both folders) is not part of the time")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--folder", help="where to write (the random model stays there for the next run); default: a temporary folder")
    args = parser.parse_args()
    busy = common.wait_until_idle()
    print(f"{common.machine()}; other processes kept {busy:.2f} cores busy at the start; {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.folder or temporary)
        model = args.model
        if model is None:
            shape = {**SHAPES[args.shape], **({"num_hidden_layers": args.layers} if args.layers else {})}
            folder = root / f"{args.shape}-{shape['num_hidden_layers']}-random"
            start = time.perf_counter()
            model = str(folder if folder.exists() else write_random_model(folder, shape, "cuda" if torch.cuda.is_available() else "cpu"))
            print(f"random weights: {time.perf_counter() - start:.1f} s (not counted)")
        print(common.describe(load_spec(resolve_model(None if model == "embedded" else model, None, None))))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        report = run(args.method, None if model == "embedded" else model, root / f"{args.method}-out", args)
        print_result(args.method, report, time.perf_counter() - start, args)
        print(format_report(report))


if __name__ == "__main__":
    main()
