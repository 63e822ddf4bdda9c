"""The proof: folders are run by the engine, as a user would run them, on the same held-out text; quality and speed come from that one engine.

Windows go through the engine's own prefill, whose attention reads what the KV cache holds, so a KV policy is really at work in every score. `measure` is what a
quantising command calls at its end; `compare.py` asks the same questions of many models and policies.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from lmdeploy.config import EngineConfig, TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.memory import trim
from lmdeploy.engine.start import build_engine
from lmdeploy.errors import CheckpointError, EngineError, LmdeployError
from lmdeploy.formats.choose import choose_formats
from lmdeploy.formats.packed8 import ScaledFormat
from lmdeploy.lite.report import Report
from lmdeploy.lite.scores import Head, Reference, Scores, TokenScores, score_rows
from lmdeploy.log import get_logger
from lmdeploy.messages import EngineOutput, EngineRequest, SamplingParams
from lmdeploy.spec import ModelSpec, load_spec

logger = get_logger(__name__)
Tensor = torch.Tensor
Windows = Sequence[list[int]]

#: A perplexity this many times as high as before means that the model is broken, not that it lost some quality.
COLLAPSE = 3.0
BLOCK = 64
#: Float32 logits that the engine hands over in one step: bounds the tokens of a step for large vocabularies.
LOGIT_BYTES = 256 << 20
MAX_STEP, MIN_STEP = 1024, 64
#: A speed is measured on this prompt and answer, shorter where the model or the text is.
PROMPT, ANSWER = 512, 32
#: Of timing each of the two models at the end of a quantising command.
SHORT_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one request alone, in tokens/s: of the prompt (its time is that until the first token) and of the answer; medians of `runs` and of `steps`."""

    prefill: float
    decode: float
    prompt_tokens: int
    runs: int
    steps: int


class EvaluationOptions(Protocol):
    """What `measure` asks of a quantising command's options."""

    dtype: str
    device: str


def engine_config(config: EngineConfig, windows: Windows, spec: ModelSpec) -> EngineConfig:
    """`config` with room for one window, or one timed request, at a time and nothing cached between them."""
    timed = min(PROMPT + ANSWER, spec.max_position)
    longest = max([timed, *(len(window) for window in windows)])
    rows = LOGIT_BYTES // (4 * spec.vocab_size) // BLOCK * BLOCK
    return config.replace(
        session_len=longest,
        max_batch_size=1,
        cache_block_seq_len=BLOCK,
        cache_max_entry_count=-(-longest // BLOCK) + 1,
        max_prefill_token_num=max(MIN_STEP, min(MAX_STEP, rows)),
        enable_prefix_caching=False,
    )


@contextlib.contextmanager
def opened(folder: Path, config: EngineConfig) -> Iterator[Engine]:
    """An engine on this thread; its memory is given back at the end."""
    engine = build_engine(folder, config)
    try:
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()
        trim()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _answers(engine: Engine, token_ids: list[int], sampling: SamplingParams) -> Iterator[EngineOutput]:
    """All outputs of one request alone in the engine; it is ended when the caller stops listening."""
    engine.add(EngineRequest(request_id=1, token_ids=token_ids, sampling=sampling))
    try:
        while engine.has_work:
            for output in engine.step():
                if output.finish_reason == "error":
                    raise EngineError(f"the model cannot be run: {output.error}")
                yield output
    finally:
        engine.abort(1)
        while engine.has_work:
            engine.step()


def score(engine: Engine, windows: Windows, reference: Reference | None = None, tick: Callable[[], None] = lambda: None) -> Scores:
    """Scores of every token of the windows but each one's first; `tick` is called after each window."""
    parts: list[TokenScores] = []
    for number, window in enumerate(windows):
        targets, done = torch.tensor(window[1:]), 0
        for output in _answers(engine, window, SamplingParams(max_new_tokens=0, output_logits="all")):
            if output.logits is None:
                continue
            rows = slice(done, min(done + output.logits.shape[0], targets.numel()))
            done += output.logits.shape[0]
            if rows.start < rows.stop:
                logits = output.logits[: rows.stop - rows.start]
                hidden = None if reference is None else reference.hidden[number][rows]
                parts.append(score_rows(logits, targets[rows], None if reference is None else reference.head, hidden))
        assert done == len(window), f"{done} rows of logits for a window of {len(window)} tokens"
        tick()
    return TokenScores.join(parts).summary()


def hidden_states(engine: Engine, windows: Windows, tick: Callable[[], None] = lambda: None) -> list[Tensor]:
    """The last hidden states [L, M] of each window, on the host."""
    found = []
    for window in windows:
        outputs = _answers(engine, window, SamplingParams(max_new_tokens=0, output_last_hidden_state="all"))
        states = [output.last_hidden_state for output in outputs if output.last_hidden_state is not None]
        found.append(torch.cat(states))
        assert found[-1].shape[0] == len(window)
        tick()
    return found


def speed(engine: Engine, token_ids: list[int], *, seconds: float = 6.0, most: int = 5) -> Speed:
    """Time one request alone, up to `most` times within about `seconds`, after a short one that is not counted. Its prompt is the head of `token_ids`.

    However slow the model is, one prompt and one token after it are always computed.
    """
    room = engine.info.session_len
    answer = min(ANSWER, max(2, room // 4))
    prompt = token_ids[: min(PROMPT, room - answer)]
    end = time.perf_counter() + seconds
    _timed(engine, prompt[:16], 4, end)
    first: list[float] = []
    rest: list[float] = []
    while not first or (len(first) < most and time.perf_counter() + first[0] < end):
        times = _timed(engine, prompt, answer, end)
        first.append(times[0])
        rest += times[1:]
    return Speed(len(prompt) / statistics.median(first), 1 / statistics.median(rest), len(prompt), len(first), len(rest))


def _timed(engine: Engine, prompt: list[int], answer: int, end: float) -> list[float]:
    """Seconds until the first token, and between the following ones: at least one, and no more after `end`."""
    times, last = [], time.perf_counter()
    outputs = _answers(engine, prompt, SamplingParams(max_new_tokens=answer, ignore_eos=True))
    with contextlib.closing(outputs):  # type: ignore[type-var]  # a generator
        for output in outputs:
            if output.token_ids:
                now = time.perf_counter()
                times.append(now - last)
                if now > end and len(times) > 1:
                    break
                last = now
    return times


def perplexity(folder: Path, windows: Windows, *, dtype: str = "auto", device: str = "auto") -> float:
    """exp of the mean cross-entropy of all tokens but each window's first."""
    with opened(folder, _plain_config(folder, windows, dtype, device)) as engine:
        return score(engine, windows).perplexity


def _plain_config(folder: Path, windows: Windows, dtype: str, device: str) -> EngineConfig:
    return engine_config(TurbomindEngineConfig(dtype=dtype, device_type=device), windows, load_spec(folder))


def measure(report: Report, before: Path, after: Path, windows: Windows, config: EvaluationOptions) -> None:
    """Quality and speed of both folders into the report. A model that collapsed is refused; one that cannot be run here is only not measured."""
    if not windows:
        report.perplexity_note = "no held-out text was asked for (eval_tokens=0)"
        return
    try:
        reference = _measure_before(report, before, windows, config)
        _measure_after(report, after, windows, config, reference)
    except (LmdeployError, MemoryError, torch.OutOfMemoryError) as error:
        report.perplexity_note = str(error) or type(error).__name__
        logger.warning("quality is not measured: %s", report.perplexity_note)
        return
    first, second = report.perplexity_before, report.perplexity_after
    assert first is not None and second is not None
    if math.isfinite(first) and not second <= COLLAPSE * first:
        raise CheckpointError(
            f"the quantised model is broken: perplexity {second:.4g} instead of {first:.4g} on held-out text; nothing is written. "
            "Try --search-scale True, a smaller --w-group-size, or calibration text that is nearer to the model's use"
        )


def _measure_before(report: Report, folder: Path, windows: Windows, config: EvaluationOptions) -> Reference:
    engine_options = _plain_config(folder, windows, config.dtype, config.device)
    with opened(folder, engine_options) as engine:
        states = hidden_states(engine, windows)
        timed = speed(engine, [token for window in windows for token in window], seconds=SHORT_SECONDS, most=3)
    report.prefill_before, report.decode_before = timed.prefill, timed.decode
    return Reference(Head(folder, engine_options), states)


def _measure_after(report: Report, folder: Path, windows: Windows, config: EvaluationOptions, reference: Reference) -> None:
    """Scores first: a broken model cannot be timed, and must be known as broken."""
    options = _plain_config(folder, windows, config.dtype, config.device)
    with opened(folder, options) as engine:
        scores = score(engine, windows, reference)
        assert scores.kl is not None
        report.perplexity_before, report.perplexity_after = scores.reference_perplexity, scores.perplexity
        if not math.isfinite(scores.perplexity):
            return
        timed = speed(engine, [token for window in windows for token in window], seconds=SHORT_SECONDS, most=3)
        report.evaluated_on = f"{engine.info.dtype} on {engine.info.memory.device}"
    report.perplexity_ratio_se, report.evaluated_tokens = scores.ratio_se, scores.tokens
    report.kl, report.kl_se, report.kl_p99, report.top1, report.top1_se = scores.kl, scores.kl_se, scores.kl_p99, scores.top1, scores.top1_se
    report.prefill_after, report.decode_after = timed.prefill, timed.decode
    if quantises_activations(folder):
        with opened(folder, options.replace(quantise_activations=False)) as engine:
            report.kl_activations = scores.kl - (score(engine, windows, reference).kl or 0.0)


def quantises_activations(folder: Path) -> bool:
    """Whether the engine would bring activations to 8 bits by itself, because the weights were made for that."""
    packed = choose_formats(load_spec(folder).quantization, None, str(folder)).packed
    return isinstance(packed, ScaledFormat) and packed.quantise_inputs
