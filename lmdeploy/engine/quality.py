"""The quality gate: what a 4-bit KV cache costs this model, measured on a short text before anything is served.

The loaded model reads the text with a small cache of each format; only the final hidden rows are kept, and logits are made of them some rows at a time, so the
measurement takes two short prefills and a few megabytes. The text tells formats apart (the difference is paired, token by token); it is no benchmark of the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from lmdeploy.config import EngineConfig
from lmdeploy.engine.batch import BatchBuilder, SlotTables
from lmdeploy.engine.key_centers import KeySample, key_centers
from lmdeploy.engine.kv_cache import PLAIN_LAYOUT, KVCache, KVLayout
from lmdeploy.engine.model import Model
from lmdeploy.engine.plan import Items, NewSequence, PlanItem
from lmdeploy.engine.scores import rows_per_chunk
from lmdeploy.engine.sizing import FORMATS
from lmdeploy.errors import ConfigError, LmdeployError
from lmdeploy.inputs import Scratch
from lmdeploy.kv_layer import KVFormat
from lmdeploy.log import get_logger
from lmdeploy.messages import KVQuality, KVScore, SamplingParams
from lmdeploy.text.tokenizer import Tokenizer

logger = get_logger(__name__)
Tensor = torch.Tensor

TEXT_TOKENS = 256
MIN_TOKENS = 32
BLOCK_SIZE = 64
#: A policy fails above either. Measured with this text on the embedded model, with and without key biases (tests/engine): policies that work have a mean KL of
#: 0.04 to 0.055 (int4) and less, those that biases ruin 0.19 to 4, with perplexity 9 % to 18 times as high. The rise alone is known to 2 or 3 % over 256 tokens.
MAX_KL = 0.1
MAX_RISE = 1.1


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading the text gave: final hidden rows [n, M], and the keys of a 16-bit cache."""

    hidden: Tensor
    sample: KeySample | None = None


class Probe:
    """`token_ids` [n], read by `model` in chunks of at most `chunk` tokens, with a cache of any layout."""

    def __init__(self, model: Model, token_ids: Sequence[int], device: torch.device, dtype: torch.dtype, chunk: int) -> None:
        self.model, self.token_ids, self.device, self.dtype = model, list(token_ids), device, dtype
        self.chunk = max(1, min(chunk, len(self.token_ids)))
        self.scratch = Scratch(self.chunk, dtype, device)
        self.rows = rows_per_chunk(model.spec.vocab_size)

    @torch.inference_mode()
    def read(self, layout: KVLayout = PLAIN_LAYOUT) -> Reading:
        """Read the text; keys are sampled where they are not quantised."""
        count, spec = len(self.token_ids), self.model.spec
        blocks = -(-count // BLOCK_SIZE)
        cache = KVCache(spec, blocks, BLOCK_SIZE, self.dtype, self.device, layout)
        tables = SlotTables(1, count, BLOCK_SIZE, self.device)
        tables.set(NewSequence(0, self.token_ids, count, SamplingParams(max_new_tokens=0), 0))
        tables.append_blocks([(0, list(range(blocks)))])
        builder = BatchBuilder(tables, cache.layers, self.scratch, uses_rope_lengths=spec.rope.depends_on_length)
        hidden, cos, sin = [], [], []
        for start in range(0, count, self.chunk):
            inputs = builder.inputs(builder.build(Items.of([PlanItem(0, start, min(self.chunk, count - start), [], True)]), [True]).layout)
            hidden.append(self.model.forward(inputs).clone())
            assert inputs.cos is not None and inputs.sin is not None
            cos.append(inputs.cos)
            sin.append(inputs.sin)
        sample = None
        if layout.format.key == "16":
            keys = [layer.key.transpose(1, 2).flatten(0, 1)[:count].float() for layer in cache.layers]
            sample = KeySample(keys, torch.cat(cos), torch.cat(sin))
        cache.free()
        return Reading(torch.cat(hidden), sample)

    @torch.inference_mode()
    def score(self, policy: str, plain: Reading, reading: Reading) -> KVScore:
        """A policy's reading against that of the 16-bit cache, over the n - 1 tokens that are predicted."""
        targets = torch.tensor(self.token_ids[1:], device=self.device)
        totals = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(targets), self.rows):
            rows = slice(start, min(start + self.rows, len(targets)))
            before, after = (torch.log_softmax(self.model.logits(r.hidden[rows]), dim=-1) for r in (plain, reading))
            loss = -after.gather(1, targets[rows, None])
            divergence = (before.exp() * (before - after)).sum(-1)
            same = before.argmax(-1) == after.argmax(-1)
            totals += torch.stack([loss.sum(), divergence.sum(), same.sum()]).double().cpu()
        loss, divergence, same = (totals / len(targets)).tolist()  # NaN stays NaN below: max() keeps its first argument then
        return KVScore(policy=policy, perplexity=math.exp(loss) if loss < 700 else math.inf, mean_kl=max(divergence, 0.0), top1=same)


@dataclass(frozen=True, slots=True)
class Examination:
    """How the pool is to be laid out, and what that costs; `quality` None: nothing has 4 bits, so nothing was measured."""

    layout: KVLayout
    quality: KVQuality | None = None


def examine(model: Model, folder: Path, config: EngineConfig, format: KVFormat, device: torch.device, dtype: torch.dtype) -> Examination:
    """Centre the keys of a quantised cache, and score a 4-bit one and, where it fails, better ones. `config` is resolved.

    kv_rotation=False asks for numbers as they are: such a cache gets no centres either.
    """
    gated, centred = "4" in (format.key, format.value), config.kv_rotation is not False
    if config.random_weights or not (gated or (centred and not format.plain)):
        return Examination(KVLayout(format), KVQuality(note="not measured: the weights are random") if gated else None)
    start = time.perf_counter()
    horizon = model.spec.max_position  # and not session_len: what is stored, and so every answer, depends on the model alone
    limit = min(TEXT_TOKENS, horizon)
    ids, note = text_ids(folder, model.spec.vocab_size, limit)
    probe = Probe(model, ids or spread_ids(model.spec.vocab_size, limit), device, dtype, config.max_prefill_token_num)
    plain = probe.read()
    layout = _layout(plain, format, centred, horizon)
    if not gated:
        return Examination(layout)
    if not ids:
        return Examination(layout, KVQuality(note=note))
    unquantised = probe.score("none", plain, plain)
    scores = [probe.score(format.name, plain, probe.read(layout))]
    better = ""
    if not _passes(scores[0], unquantised):
        for name, other in _better(format, centred):
            scores.append(probe.score(other.name, plain, probe.read(_layout(plain, other, True, horizon))))
            if _passes(scores[-1], unquantised):
                better = name
                break
    return Examination(
        layout,
        KVQuality(
            tokens=len(ids) - 1,
            perplexity=unquantised.perplexity,
            scores=scores,
            passed=_passes(scores[0], unquantised),
            better=better,
            seconds=time.perf_counter() - start,
        ),
    )


def text_ids(folder: Path, vocab_size: int, limit: int) -> tuple[list[int], str]:
    """The first `limit` ids of the start-up text, or none and why."""
    try:
        ids = Tokenizer(folder).encode(startup_text())[:limit]
    except LmdeployError as error:
        return [], f"not measured: {error}"
    if len(ids) < MIN_TOKENS:
        return [], f"not measured: {limit} positions hold too little text"
    if max(ids) >= vocab_size:
        return [], f"not measured: the tokenizer has more tokens than the model ({max(ids)} of {vocab_size})"
    return ids, ""


def startup_text() -> str:
    """Plain prose, which any model knows; errors of a cache come from the shape of keys and values, hardly from the subject."""
    return (resources.files("lmdeploy") / "assets" / "kv_check.txt").read_text(encoding="utf-8")


def spread_ids(vocab_size: int, count: int) -> list[int]:
    """Ids from all over the vocabulary: biases of keys show whatever the tokens are."""
    return [i * (vocab_size - 1) // max(1, count - 1) for i in range(max(2, count))]


def _layout(plain: Reading, format: KVFormat, centred: bool, horizon: int) -> KVLayout:
    assert plain.sample is not None
    return KVLayout(format, key_centers(plain.sample, format, horizon) if centred else ())


def _passes(score: KVScore, unquantised: KVScore) -> bool:
    """False for NaN too."""
    return score.mean_kl <= MAX_KL and score.perplexity <= MAX_RISE * unquantised.perplexity


def _better(format: KVFormat, centred: bool) -> Iterator[tuple[str, KVFormat]]:
    """What to try instead, smallest cache first: (options in the user's words, format)."""
    policies: tuple[int | str, ...] = (4, "k8v4", 8) if format.key == "4" else ("k8v4", 8)
    for policy in policies:
        other = FORMATS[policy]
        if not (centred and other == format):
            yield f"quant_policy={policy}" + ("" if centred else " without kv_rotation=False"), other


def judge(quality: KVQuality, strict: bool) -> None:
    """Tell the user; ConfigError when the cache fails and `strict`."""
    line = describe(quality)
    if quality.passed or quality.note:
        logger.info("%s", line)
    elif strict:
        raise ConfigError(f"strict_quality=True: {line}")
    else:
        logger.warning("%s", line)


def describe(quality: KVQuality) -> str:
    """One line for people: what was measured, and what to do where it is too much."""
    if quality.note:
        return f"KV cache quality {quality.note}"
    first = quality.scores[0]
    line = f"KV cache {_told(first, quality)}; measured on {quality.tokens} tokens in {quality.seconds:.1f} s"
    if quality.passed:
        return line
    limits = f"mean KL {MAX_KL}, perplexity {(MAX_RISE - 1) * 100:+.0f} %"
    if not quality.better:
        return f"{line}. That is too much ({limits}), and no quantised cache does better: use quant_policy=0"
    last = quality.scores[-1]
    return f"{line}. That is too much ({limits}): use {quality.better} ({_told(last, quality)})"


def _told(score: KVScore, quality: KVQuality) -> str:
    rise = (score.perplexity / quality.perplexity - 1) * 100
    return (
        f"{score.policy}: perplexity {quality.perplexity:.4g} -> {score.perplexity:.4g} ({rise:+.1f} %), mean KL {score.mean_kl:.2g}, "
        f"same likeliest token {score.top1 * 100:.1f} %"
    )
