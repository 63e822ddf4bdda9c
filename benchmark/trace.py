"""What host and device do in a step, by `torch.profiler`: `python -m benchmark.trace MODEL --batch 1 64 256 --svg step.svg`.

Every answer decodes; for each batch size the time of a step, how much of it the device works, and what the host does meanwhile by part
(its clocks run without the profiler). --svg draws some steps of the last batch size, from the profiler's own spans, both on one clock.
Needs a CUDA device. With --random-weights MODEL is a folder with a config.json.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch

from benchmark import common
from benchmark.latency import prompts
from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.start import build_engine
from lmdeploy.messages import EngineRequest, SamplingParams
from lmdeploy.spec import ModelSpec, load_spec

#: the host's parts of a step, in their order
PARTS = ("plan", "launch", "wait", "take in")
#: what stands before a part's name among the profiler's spans
MARK = "host: "
#: steps before any is looked at: prompts and captures are over
FIRST = 30
#: a kernel's kind by its name, the first that fits
KINDS = (
    ("attention", re.compile("decode|attention|flash|cudnn")),
    ("norms", re.compile("norm")),
    ("choice of tokens", re.compile("choose|more_kernel|places")),
    ("SiLU", re.compile("silu")),
    ("products", re.compile("row|gemm|nvjet|once|few|async|linear|splitK|part", re.IGNORECASE)),
)
COLOURS = {
    "plan": "#4c78a8", "launch": "#f58518", "wait": "#e6e6e6", "take in": "#54a24b",
    "attention": "#b279a2", "products": "#4c78a8", "norms": "#f58518", "SiLU": "#eeca3b", "choice of tokens": "#e45756", "other": "#9d755d",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """A part of the host's work or a kernel, in microseconds since the first of them."""

    begin: float
    end: float
    name: str
    device: bool


@dataclass(slots=True)
class Traced:
    """Steps of one batch size."""

    step: float  # seconds, without the profiler
    host: float  # seconds of a step without the wait, median, without the profiler
    parts: dict[str, float]  # seconds by part, medians, without the profiler
    spans: list[Span] = field(default_factory=list)
    steps: int = 0  # that `spans` has

    @property
    def busy(self) -> float:
        """The share of the time in which some kernel ran."""
        kernels = sorted((span.begin, span.end) for span in self.spans if span.device)
        total, last = 0.0, kernels[0][0]
        for begin, end in kernels:
            total += max(0.0, end - max(begin, last))
            last = max(last, end)
        return total / (last - kernels[0][0])

    @property
    def kernels(self) -> float:
        """Kernels and copies a step."""
        return sum(span.device for span in self.spans) / self.steps


def kind_of(name: str) -> str:
    """What a kernel is for."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


class Clocks:
    """Seconds of calls by part, while they are there; marks for the profiler."""

    def __init__(self, engine: Engine, *, marks: bool) -> None:
        executor = engine._executor
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._marks = marks
        self._undo: list[tuple[Any, str]] = []
        steps = ((engine.scheduler, "schedule"), (executor, "submit"), (executor, "result"), (engine.scheduler, "update"))
        for part, (owner, method) in zip(PARTS, steps, strict=True):
            self._around(owner, method, part)

    def _around(self, owner: Any, method: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*given: Any) -> Any:
            start = time.perf_counter()
            try:
                if not self._marks:
                    return inner(*given)
                with torch.profiler.record_function(MARK + part):
                    return inner(*given)
            finally:
                self.seconds[part].append(time.perf_counter() - start)

        setattr(owner, method, timed)
        self._undo.append((owner, method))

    def stop(self) -> None:
        """Leave the objects as they were."""
        for owner, method in self._undo:
            delattr(owner, method)


def trace(engine: Engine, spec: ModelSpec, batch: int, prompt: int, steps: int, first_id: int) -> Traced:
    """Look at `steps` steps in the middle of `batch` answers, first with clocks, then with the profiler."""
    for i, ids in enumerate(prompts(spec, batch, prompt)):
        engine.add(EngineRequest(request_id=first_id + i, token_ids=ids, sampling=SamplingParams(max_new_tokens=FIRST + 6 * steps, ignore_eos=True)))
    for _ in range(FIRST):
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    clocks, host = Clocks(engine, marks=False), []
    for _ in range(2 * steps):
        start = time.perf_counter()
        engine.step()
        host.append(time.perf_counter() - start - clocks.seconds["wait"][-1])
    clocks.stop()
    found = Traced(seconds, statistics.median(host), {part: statistics.median(clocks.seconds[part]) for part in PARTS})
    marks = Clocks(engine, marks=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    marks.stop()
    found.spans, found.steps = _spans(profile.profiler.kineto_results.events()), steps
    engine.abort_all()
    while engine.has_work:
        engine.step()
    return found


def _spans(events: Iterable[Any]) -> list[Span]:
    """Kernels and copies on the device, and the host's parts; the profiler's shadows of those on the device are left out."""
    rows = []
    for event in events:
        device, name = "CUDA" in str(event.device_type()), event.name()
        if device != name.startswith(MARK):
            rows.append((event.start_ns(), event.start_ns() + event.duration_ns(), name, device))
    rows.sort()
    first = rows[0][0]
    return [Span((begin - first) / 1e3, (end - first) / 1e3, name if device else name.removeprefix(MARK), device) for begin, end, name, device in rows]


def draw(traced: Traced, title: str, steps: float = 2.2, width: int = 1200) -> str:
    """An SVG of some steps from the middle on: the host's parts above, the device's kernels below (two rows, for the next may begin before one has ended)."""
    plans = [span.begin for span in traced.spans if not span.device and span.name == "plan"]
    begin = plans[len(plans) // 2]
    length = steps * statistics.median(b - a for a, b in zip(plans, plans[1:], strict=False))
    left, scale = 70, (width - 90) / length
    sums: dict[tuple[bool, str], float] = defaultdict(float)
    lines, row = [], 0
    for span in traced.spans:
        if span.end < begin or span.begin > begin + length:
            continue
        at, end = max(span.begin, begin), min(span.end, begin + length)
        kind = kind_of(span.name) if span.device else span.name
        row = 1 - row if span.device else row
        top, high = (110 + 32 * row, 30) if span.device else (50, 40)
        sums[span.device, kind] += (end - at) / steps
        hint = f"{span.name}: {span.end - span.begin:.0f} us"
        x = left + (at - begin) * scale
        lines.append(
            f'<rect x="{x:.2f}" y="{top}" width="{max((end - at) * scale, 0.4):.2f}" height="{high}" fill="{COLOURS[kind]}"><title>{escape(hint)}</title></rect>'
        )
    legend, x, y = [], left, 210
    for on_device in (False, True):
        for (device, kind), us in sorted(sums.items(), key=lambda item: -item[1]):
            if device == on_device:
                legend.append(
                    f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{COLOURS[kind]}"/><text x="{x + 17}" y="{y}">{kind} {us:,.0f} us</text>'
                )
                x += 165
        x, y = left, y + 22
    step = 10 ** len(str(int(length / 5))) / 10
    step = next(n * step for n in (1, 2, 5, 10) if length / (n * step) <= 8)
    ticks = []
    for n in range(int(length / step) + 1):
        x = left + n * step * scale
        ticks.append(f'<path d="M{x:.1f} 176v6" stroke="#555"/><text x="{x + 3:.1f}" y="188" fill="#555">{n * step / 1e3:g} ms</text>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 245" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="245" fill="white"/><text x="{left}" y="28" font-size="15">{escape(title)}</text>',
        '<text x="10" y="75">host</text><text x="10" y="145">device</text>', *lines, *ticks, *legend, "</svg>", "",
    ])  # fmt: skip


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.trace", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="model folder or hub id; default: the embedded model")
    parser.add_argument("--random-weights", action="store_true", help="the folder needs only a config.json; weights are random")
    parser.add_argument("--model-format", help="weight layout, as the engine's option; awq with --random-weights: random 4-bit weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256], help="answers at once (default 1 64 256)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt (default 128)")
    parser.add_argument("--steps", type=int, default=24, help="steps that are profiled (default 24)")
    parser.add_argument("--svg", type=Path, help="draw some steps of the last batch size to this file")
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    args = parse()
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmark.trace shows what a CUDA device does in a step, and there is none here; what the host costs, anywhere: python -m benchmark.host_loop"
        )
    folder = resolve_model(args.model, None, None)
    spec = load_spec(folder, None)
    longest = args.prompt + FIRST + 6 * args.steps + 1
    config = TurbomindEngineConfig(
        session_len=min(longest, spec.max_position),
        max_batch_size=max(args.batch),
        cache_max_entry_count=max(args.batch) * (longest // 64 + 2),
        enable_prefix_caching=False,
        random_weights=args.random_weights,
        model_format=args.model_format,
        hf_overrides=common.overrides(spec, args.model_format, random_weights=args.random_weights),
    )
    engine = build_engine(folder, config)
    print(f"{common.describe(spec)}, {engine.info.dtype}\n{common.machine()}; {common.prepare_ahead(engine)}\n")
    rows, next_id = [["answers", "a step, ms", "device busy", "host's work, us", *(f"{part}, us" for part in PARTS), "kernels a step"]], 1
    for batch in args.batch:
        found = trace(engine, spec, batch, args.prompt, args.steps, next_id)
        next_id += batch
        rows.append(
            [
                str(batch),
                f"{found.step * 1e3:.3f}",
                f"{found.busy:.1%}",
                f"{found.host * 1e6:.0f}",
                *(f"{found.parts[part] * 1e6:.0f}" for part in PARTS),
                f"{found.kernels:.0f}",
            ]
        )
    common.print_table(rows)
    if args.svg:
        args.svg.write_text(
            draw(found, f"{folder.name}, {engine.info.dtype}, {torch.cuda.get_device_name()}: {batch} answers, {found.step * 1e3:.2f} ms a step")
        )
    engine.close()


if __name__ == "__main__":
    main()
