"""`compare`: models times KV policies, one engine after the other, all on the same held-out text; a row that fails says why and the others go on.

The reference is the first model with a 16-bit KV cache: KL divergence and agreement are measured against it. The result as JSON (`Comparison.as_json`) is one object:

    schema 1 | created (ISO 8601, UTC) | command | machine {name: text} | versions {package: version} | settings {flag: value} |
    text {origin, tokens, windows, window} | reference (name of the model) | memory_bytes (what `kv_tokens` is counted for) | rows [Row]

A row has the fields of `Row`; its `scores` and `speed` are the objects `scores.Scores` and `evaluate.Speed`, or null where `problem` says why. Numbers that are
not finite are null. Later versions may add keys; a key that changes its meaning raises `schema`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.config import EngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.memory import free_bytes
from lmdeploy.engine.sizing import gib
from lmdeploy.engine.start import choose_device
from lmdeploy.errors import CheckpointError, ConfigError, LmdeployError
from lmdeploy.lite.compare_options import CompareConfig, Policy
from lmdeploy.lite.datasets import MIN_TOKENS, CalibrationText, embedded_text, load_text
from lmdeploy.lite.evaluate import Speed, engine_config, hidden_states, opened, score, speed
from lmdeploy.lite.options import DATASETS
from lmdeploy.lite.report import folder_bytes
from lmdeploy.lite.scores import Head, Reference, Scores
from lmdeploy.log import get_logger
from lmdeploy.messages import MemoryBill
from lmdeploy.spec import ModelSpec, load_spec
from lmdeploy.text.tokenizer import Tokenizer

logger = get_logger(__name__)

SCHEMA = 1
#: More characters than this a token has nowhere: the text is cut before it is tokenised.
CHARS_PER_TOKEN = 16


@dataclass(slots=True)
class Row:
    """One model with one KV policy. Bytes are bytes; what was not measured is 0 or None, and `problem` says why ('' = all is well).

    weights: how the folder stores them. disk_bytes: all files. weight_bytes: in memory. process_bytes: resident memory (CPU) or memory in use on the device
    once the engine for one sequence stands. kv_bytes_per_token: keys and values of all layers, scales included. kv_tokens: how many of them fit into
    `memory_bytes` beside weights and workspace.
    """

    model: str
    folder: str
    policy: str
    reference: bool
    weights: str = ""
    dtype: str = ""
    device: str = ""
    disk_bytes: int = 0
    weight_bytes: int = 0
    process_bytes: int = 0
    kv_bytes_per_token: int = 0
    kv_tokens: int = 0
    scores: Scores | None = None
    speed: Speed | None = None
    seconds: float = 0.0
    problem: str = ""


@dataclass(slots=True)
class Comparison:
    """The results, and all that is needed to get them again; see the module's text for the keys."""

    settings: dict[str, Any]
    text: dict[str, Any]
    reference: str
    memory_bytes: int
    command: str = ""
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    schema: int = SCHEMA
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> str:
        """See the module's text."""
        return json.dumps(_finite(dataclasses.asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Candidate:
    """A folder that was asked for, under the name that tables show; `problem` when it is no model."""

    name: str
    folder: Path
    spec: ModelSpec | None
    problem: str = ""


class Comparer:
    """One run. Everything that the user can get wrong for all rows is checked by the constructor; `run` computes them one by one."""

    def __init__(self, models: Sequence[str | None], config: CompareConfig) -> None:
        self.config, self.policies = config, config.kv_policies()
        self.candidates = _find(models or [None], config)
        first = self.candidates[0]
        if first.spec is None:
            raise CheckpointError(f"the first model is what the others are compared with, and it cannot be used: {first.problem}")
        self.text = _text(config)
        self.excerpt = self.text.text[-CHARS_PER_TOKEN * config.tokens :]
        self.token_ids = Tokenizer(first.folder).encode(self.excerpt)
        self.windows = cut(self.token_ids, config.tokens, min(config.window, first.spec.max_position))
        self.device = choose_device(config.engine())
        self._reference: Reference | None = None
        budget = free_bytes(self.device) if config.memory is None else int(config.memory * 2**30)
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        text = {"origin": self.text.origin, "tokens": sum(map(len, self.windows)), "windows": len(self.windows), "window": len(self.windows[0])}
        self.comparison = Comparison(settings, text, first.name, budget)

    def run(self) -> Comparison:
        """All rows; `comparison.rows` grows as they come, so that an interrupted run has what was finished."""
        jobs = [(candidate, policy) for candidate in self.candidates for policy in self.policies]
        steps = len(self.windows) + 1 + self.config.speed
        with tqdm(total=len(jobs) * steps, desc="comparing", unit="step", dynamic_ncols=True, smoothing=0.1) as bar:
            for number, (candidate, policy) in enumerate(jobs, 1):
                bar.set_postfix_str(f"{candidate.name}, KV {policy.bits}", refresh=True)
                row = Row(candidate.name, str(candidate.folder), policy.name, reference=number == 1)
                self._fill(row, candidate, policy, bar.update)
                self.comparison.rows.append(row)
                bar.n = number * steps
                bar.refresh()
        return self.comparison

    def _fill(self, row: Row, candidate: Candidate, policy: Policy, tick: Callable[[], object]) -> None:
        """Measure one row; whatever goes wrong with it becomes its `problem`."""
        start = time.perf_counter()
        try:
            if candidate.spec is None:
                raise CheckpointError(candidate.problem)
            row.weights, row.disk_bytes = stored_as(candidate.spec), folder_bytes(candidate.folder)
            self._check_memory(row)
            self._measure(row, candidate, candidate.spec, policy, tick)
        except (LmdeployError, MemoryError, OSError, RuntimeError) as error:  # torch says with a RuntimeError that memory ran out
            row.problem = " ".join(str(error).split())[:600] or type(error).__name__
            logger.info("%s, KV policy %s: %s", row.model, row.policy, row.problem)
        row.seconds = time.perf_counter() - start

    def _check_memory(self, row: Row) -> None:
        """Loading what cannot fit would have the system end the whole process."""
        free = free_bytes(self.device)
        if row.disk_bytes > free:
            raise ConfigError(f"does not fit: its files are {gib(row.disk_bytes)}, and {gib(free)} of memory are free")

    def _measure(self, row: Row, candidate: Candidate, spec: ModelSpec, policy: Policy, tick: Callable[[], object]) -> None:
        row.problem = self._not_comparable(candidate, spec)
        config = policy.config(engine_config(self.config.engine(), [] if row.problem else self.windows, spec))
        with opened(candidate.folder, config) as engine:
            tick()
            self._note_memory(row, engine.info.memory)
            row.dtype, row.device = engine.info.dtype, engine.info.memory.device
            if not row.problem:
                row.scores = self._score(row, engine, candidate.folder, config, lambda: _ignore(tick()))
            if row.scores is not None and not math.isfinite(row.scores.perplexity):
                row.problem = "broken: its probabilities are no numbers, or 0 for a token of the text"
            elif self.config.speed:
                row.speed = speed(engine, [token for window in self.windows for token in window if token < spec.vocab_size])

    def _score(self, row: Row, engine: Engine, folder: Path, config: EngineConfig, tick: Callable[[], None]) -> Scores:
        if row.reference:
            self._reference = Reference(Head(folder, config), hidden_states(engine, self.windows))
            return score(engine, self.windows, None, tick)
        return score(engine, self.windows, self._reference, tick)

    def _note_memory(self, row: Row, bill: MemoryBill) -> None:
        """What the comparison itself keeps does not count."""
        row.weight_bytes, row.kv_bytes_per_token = bill.weights, bill.bytes_per_token
        row.process_bytes = bill.total - (self._reference.taken() if self._reference else 0)
        blocks = max(0, self.comparison.memory_bytes - bill.weights - bill.workspace) // (bill.block_size * bill.bytes_per_token)
        row.kv_tokens = blocks * bill.block_size

    def _not_comparable(self, candidate: Candidate, spec: ModelSpec) -> str:
        """Why KL divergence would be meaningless, '' when it is not: the same text must be the same tokens."""
        first = self.candidates[0]
        assert first.spec is not None
        if spec.vocab_size != first.spec.vocab_size:
            return (
                f"not comparable: its vocabulary has {spec.vocab_size} tokens, that of {first.name} {first.spec.vocab_size}; only speed and memory are measured"
            )
        if candidate.folder != first.folder and Tokenizer(candidate.folder).encode(self.excerpt) != self.token_ids:
            return f"not comparable: its tokenizer cuts the text into other tokens than that of {first.name}; only speed and memory are measured"
        return ""


def _text(config: CompareConfig) -> CalibrationText:
    """What `--text` names: a file or folder, a data set of the hub, or by default the text of the package."""
    if config.text is None:
        return CalibrationText(embedded_text(), "the text of the package")
    if config.text not in (*DATASETS, "embedded") and not Path(config.text).expanduser().exists():
        raise ConfigError(f"text={config.text!r} is neither a file or folder nor one of {', '.join(DATASETS)}; leave it out for the text of the package")
    found = load_text(config.text, config.download_dir)
    if found.notice:
        logger.warning("%s", found.notice)
    return found


def _ignore(_: object) -> None:
    """tqdm's update returns a flag that nobody wants."""


def cut(token_ids: list[int], tokens: int, width: int) -> list[list[int]]:
    """The last `tokens` ids in windows of at most `width`, as equal as can be."""
    ids = token_ids[-tokens:]
    if len(ids) < MIN_TOKENS:
        raise ConfigError(f"the text has {len(ids)} tokens; at least {MIN_TOKENS} are needed, and some thousand tell models apart")
    if len(ids) < tokens:
        logger.warning("the text has %d tokens; %d were asked for", len(ids), tokens)
    count = -(-len(ids) // width)
    bounds = [i * len(ids) // count for i in range(count + 1)]
    return [ids[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def stored_as(spec: ModelSpec) -> str:
    """How a folder stores its linear layers, in a word or two."""
    found = spec.quantization
    if found is None:
        return spec.dtype
    bits = found.get("bits") or found.get("w_bit")
    return f"{found.get('quant_method', 'quantised')}{f' {bits} bit' if bits else ''}"


def _find(models: Sequence[str | None], config: CompareConfig) -> list[Candidate]:
    """Folders and short, distinct names."""
    found: list[tuple[str | None, Path | None, str]] = []
    for model in models:
        try:
            found.append((model, resolve_model(model, config.download_dir).resolve(), ""))
        except LmdeployError as error:
            found.append((model, None, str(error)))
    hub = {model for model, _, _ in found if model is not None and not Path(model).expanduser().exists()}
    names = _names([str(model if model in hub else folder) for model, folder, _ in found])
    return [_candidate(name, folder, problem, str(model)) for name, (model, folder, problem) in zip(names, found, strict=True)]


def _candidate(name: str, folder: Path | None, problem: str, asked: str) -> Candidate:
    if folder is None:
        return Candidate(name, Path(asked), None, problem)
    try:
        return Candidate(name, folder, load_spec(folder))
    except LmdeployError as error:
        return Candidate(name, folder, None, str(error))


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, more of it where two would be alike, numbers where they are the same."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]).replace("//", "/") for p in parts]
        if len(set(names)) == len(set(paths)):
            break
    return [name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)]
