"""What the engine's own Python costs a step: `python -m benchmark.host_loop --batch 1 64 256`.

The real Engine, Scheduler, ModelRunner and Frontend over a model that computes nothing and a pretended device: a step takes it --device-ms
after the one before, tokens are random. So every microsecond is the host's. Four tables: the parts of a decode step when the batch is
full, the same with prompts of different lengths, while requests end and arrive all the time, and how long the pretended device had nothing to do while a thread of the same
process turned tokens into text (the offline pipeline).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmark import common
from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.config import GenerationConfig, TurbomindEngineConfig
from lmdeploy.engine.client import EngineThread
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.executor.local import LocalExecutor
from lmdeploy.engine.graphs import Shape, StepGraphs
from lmdeploy.engine.runner import ModelRunner
from lmdeploy.engine.sizing import PoolRequest
from lmdeploy.frontend import Frontend
from lmdeploy.inputs import ForwardInputs
from lmdeploy.messages import EngineInfo, EngineRequest, SamplingParams
from lmdeploy.models.language_spec import language_spec
from lmdeploy.pipeline import Pipeline
from lmdeploy.spec import ModelSpec
from lmdeploy.text.chat_template import load_chat_template
from lmdeploy.text.tokenizer import Tokenizer

BLOCK = 64
PROMPT = 128
#: first steps of a run that do not count
SKIPPED = 12


class NoModel:
    """Rows of zeros, whatever is asked."""

    weight_bytes = 0

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        """Hidden rows of the right shape."""
        return torch.zeros((len(inputs.logit_rows), self.spec.hidden_size))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Token 0 is the likeliest."""
        return torch.zeros((hidden.shape[0], self.spec.vocab_size))

    def raw_logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """The same."""
        out.zero_()

    def shallow(self) -> tuple[NoModel, float]:
        """It has no layers to leave out."""
        return self, 1.0


class Device:
    """A device that takes `seconds` a step and works through its queue alone; counts what it waited for its host."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.idle, self.steps = seconds, 0.0, -SKIPPED
        self._free_at = 0.0
        self._ends: deque[float] = deque()

    def launch(self) -> None:
        """Queue a step."""
        now = time.perf_counter()
        if self.steps > 0:
            self.idle += max(0.0, now - self._free_at)
        self.steps += 1
        self._free_at = max(now, self._free_at) + self.seconds
        self._ends.append(self._free_at)

    def wait(self) -> None:
        """Until the oldest step has ended; other threads run meanwhile."""
        left = self._ends.popleft() - time.perf_counter()
        if left > 0:
            time.sleep(left)

    def rest(self) -> None:
        """What follows is another measurement; its first steps, those with prompts, do not count."""
        self.idle, self.steps, self._free_at = 0.0, -SKIPPED, 0.0


class NoGraph:
    """Computes nothing."""

    def replay(self) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing."""


class PretendedGraphs(StepGraphs):
    """All of the host's part, on buffers of the CPU, and random tokens."""

    def __init__(self, runner: ModelRunner, text_ids: list[int]) -> None:
        zeros = torch.zeros
        with (
            mock.patch("torch.zeros", lambda *size, pin_memory=False, **options: zeros(*size, **options)),
            mock.patch("torch.cuda.graph_pool_handle", lambda: (0, 0)),
        ):
            super().__init__(
                runner.model, runner.batches, runner.sampler, runner.arrivals.lines, runner.arrivals.take_line, runner.max_batch_size, torch.float32
            )
        self._lines[:] = torch.tensor(np.random.default_rng(0).choice(text_ids, self._lines.shape[1]))

    def _captured(self, shape: Shape) -> None:
        graph: Any = NoGraph()
        self._graphs[shape] = graph


class PretendedExecutor(LocalExecutor):
    """One rank in this thread; its results are there when the device says so."""

    device: Device

    def submit(self, plan: Any) -> None:
        """Launch."""
        super().submit(plan)
        self.device.launch()

    def result(self) -> Any:
        """Wait."""
        self.device.wait()
        return super().result()


@dataclasses.dataclass(slots=True)
class Bench:
    """An engine on the pretended device."""

    engine: Engine
    device: Device
    spec: ModelSpec
    folder: Path


def build(batch: int, seconds: float) -> Bench:
    """The real engine around a model that computes nothing."""
    folder = resolve_model(None, None, None)
    spec = dataclasses.replace(language_spec(folder, None), num_layers=1)
    text_ids = Tokenizer(folder).encode((Path(__file__).resolve().parents[1] / "docs" / "architecture.md").read_text())
    config = TurbomindEngineConfig(dtype="float32", max_batch_size=batch, max_prefill_token_num=8192, session_len=2048)
    pool = PoolRequest(batch * 12 + 64, BLOCK, 2048)
    runner = ModelRunner(NoModel(spec), config, pool, torch.device("cpu"), torch.float32)
    runner.graphs = PretendedGraphs(runner, text_ids)
    info = EngineInfo(
        session_len=2048, vocab_size=spec.vocab_size, max_batch_size=batch, memory=runner.memory, kernels={}, dtype="float32", start_seconds=0.0
    )  # fmt: skip
    executor = PretendedExecutor(runner, info)
    executor.device = Device(seconds)
    engine = Engine(
        executor, max_prefill_token_num=8192, max_waiting=1 << 20, enable_prefix_caching=True, rope_depends_on_length=False, run_ahead=1
    )  # fmt: skip
    return Bench(engine, executor.device, spec, folder)


class Clock:
    """Seconds of each part of each step."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = defaultdict(list)

    def around(self, owner: Any, name: str, part: str) -> None:
        """Time every call of a method of an object."""
        inner: Callable[..., Any] = getattr(owner, name)
        seconds = self.parts[part]

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args)
            finally:
                seconds.append(time.perf_counter() - start)

        setattr(owner, name, timed)

    def microseconds(self, part: str) -> float:
        """Median of a part."""
        return statistics.median(self.parts[part]) * 1e6


def request(number: int, new_tokens: int, prompt: int = PROMPT) -> EngineRequest:
    """Greedy, with the end-of-sequence token that a real request has, which never comes."""
    ids = np.random.default_rng(number).integers(0, 5000, prompt).tolist()
    return EngineRequest(request_id=number, token_ids=ids, sampling=SamplingParams(max_new_tokens=new_tokens, stop_token_ids=(2,)))


def parts_of_a_step(batch: int, steps: int, *, steady: bool, spread: bool = False) -> list[str]:
    """A row of the first two tables (a full batch decodes) or the third one (answers of 100 tokens, a new request for each that ends). `spread`: prompts of
    different lengths, so that a few answers need a new block in every step; otherwise all do in the same one."""
    bench = build(batch, 0.0)
    engine, clock = bench.engine, Clock()
    executor = engine._executor
    for number in range(batch):
        tokens = steps + 20 if steady else 1 + number * 100 // batch
        engine.add(request(number, tokens, PROMPT + (number * 7 % BLOCK if spread else 0)))
    number = batch
    for _ in range(8 if steady else 120):
        for output in engine.step().others:
            if output.finish_reason is not None:
                engine.add(request(number, 100))
                number += 1
    clock.around(engine.scheduler, "schedule", "schedule")
    clock.around(executor, "submit", "submit")
    clock.around(executor, "result", "result")
    clock.around(engine.scheduler, "update", "update")
    clock.around(engine, "step", "step")
    for _ in range(steps):
        for output in engine.step().others:
            if output.finish_reason is not None and not steady:
                engine.add(request(number, 100))
                number += 1
    engine.abort_all()
    while engine.has_work:
        engine.step()
    engine.scheduler.check_integrity()
    engine.close()
    return [str(batch), *(f"{clock.microseconds(part):.0f}" for part in ("schedule", "submit", "result", "update", "step"))]


def beside_text(batch: int, seconds: float, new_tokens: int) -> list[str]:
    """A row of the third table: the same batch once by the engine alone, once through `pipeline`."""
    bench = build(batch, seconds)
    for number in range(batch):
        bench.engine.add(request(number, new_tokens))
    while bench.engine.has_work:
        bench.engine.step()
    alone = bench.device.idle / bench.device.steps
    bench.device.rest()
    tokenizer = Tokenizer(bench.folder)
    template = load_chat_template(bench.folder, bench.spec, tokenizer, None)
    client = EngineThread(lambda: bench.engine)
    cpu: list[float] = []
    step = bench.engine.step

    def timed() -> Any:
        start = time.thread_time()
        outputs = step()
        cpu.append(time.thread_time() - start)
        return outputs

    bench.engine.step = timed  # type: ignore[method-assign]
    prompts = [np.random.default_rng(number).integers(0, 5000, PROMPT).tolist() for number in range(batch)]
    with Pipeline(Frontend(client, tokenizer, template, bench.spec, model_name="none", model_path="none")) as pipe:
        gen = GenerationConfig(max_new_tokens=new_tokens, do_sample=False)
        start, before = time.perf_counter(), time.thread_time()
        pipe(prompts, gen, use_tqdm=False)
        wall, reader = time.perf_counter() - start, time.thread_time() - before
    steps = bench.device.steps
    figures = (alone, bench.device.idle / steps, statistics.median(cpu), reader / steps)
    return [str(batch), f"{seconds * 1e3:.1f}", f"{wall / steps * 1e3:.2f}", *(f"{x * 1e6:.0f}" for x in figures)]


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.host_loop", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256], help="batch sizes (default 1 64 256)")
    parser.add_argument("--steps", type=int, default=300, help="steps that are timed (default 300)")
    parser.add_argument("--device-ms", type=float, default=3.5, help="what a step takes the pretended device beside the pipeline (default 3.5)")
    parser.add_argument("--busy", action="store_true", help="do not wait until other programs are idle")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(1)
    busy = 0.0 if args.busy else common.wait_until_idle()
    print(
        f"{common.machine()}; other processes kept {busy:.2f} cores busy at the start; switch interval {__import__('sys').getswitchinterval() * 1e3:.1f} ms\n"
    )
    head = ["batch", "schedule", "submit", "result", "update", "whole step"]
    print("us a step (median), a full batch decodes")
    common.print_table([head, *(parts_of_a_step(batch, args.steps, steady=True) for batch in args.batch)])
    print("\nus a step (median), the same with prompts of different lengths")
    common.print_table([head, *(parts_of_a_step(batch, args.steps, steady=True, spread=True) for batch in args.batch)])
    print("\nus a step (median), a request ends and one arrives every 100 / batch steps")
    common.print_table([head, *(parts_of_a_step(batch, args.steps, steady=False) for batch in args.batch)])
    print(
        "\nthe offline pipeline; us a step: the device idle with the engine alone, the device idle here, processor time of the engine's thread and of the reader's"
    )
    rows = [beside_text(batch, args.device_ms / 1e3, args.steps) for batch in args.batch]
    common.print_table([["batch", "device ms", "wall ms", "idle alone", "idle", "engine", "reader"], *rows])
    assert threading.active_count() < 10


if __name__ == "__main__":
    main()
