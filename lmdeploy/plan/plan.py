"""The whole answer of `lmdeploy plan`: parts, KV policies, bill, speed, the grid of combinations, and the command line that is recommended.

Combinations are preferred by what they cost in quality: the mean KL divergences of docs/quantise.md, added up. Must not import torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.config import DTYPES, UNUSED_VALUES, EngineConfig
from lmdeploy.engine.sizing import FORMATS, choose_format, gib
from lmdeploy.errors import ConfigError
from lmdeploy.models.language_spec import language_spec
from lmdeploy.models.names import class_of
from lmdeploy.models.weight_bytes import DENSE, FP8, PARTS, W4, W8, Storage, matrices, parameters, stored
from lmdeploy.plan.fit import Fit, Subject, rank_weights, subject, try_fit
from lmdeploy.plan.machines import CARDS, choose_machine, cpu_number_bytes
from lmdeploy.plan.options import PlanConfig
from lmdeploy.vision.spec import load_vision_spec

DEFAULT_CONTEXT = 4096
BATCHES = (1, 8, 64)
RANKS = (1, 2, 4, 8)
POLICIES: tuple[int | str, ...] = (0, 8, "k8v4", 4)
#: mean KL in nats, docs/quantise.md
KL_WEIGHTS = {DENSE: 0.0, FP8: 0.005, W4: 0.02}
KL_POLICIES: dict[int | str, float] = {0: 0.0, 8: 0.0004, "k8v4": 0.004, 4: 0.02}
#: smaller steps, for a model that fills its card
LEAN = {"max_batch_size": 16, "max_prefill_token_num": 2048}
#: beyond this share of the free memory nothing is recommended: kernels and the C library keep what no estimate sees
MAX_SHARE = 0.9
#: What decoding reached of this ceiling on a CPU (benchmark/RESULTS.md): bits -> batch -> share. None was measured on a GPU.
MEASURED_ON_CPU: dict[str, dict[int, float]] = {"16 bit": {1: 0.95, 8: 0.90}, "W4": {1: 0.71, 8: 0.65}, "W8": {1: 0.81, 8: 0.74}, "fp8": {1: 0.58}}


@dataclass(frozen=True, slots=True)
class PartRow:
    """Bytes of a part on one rank for each way to store the weights, in the order of `Plan.storages`."""

    part: str
    nbytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """A KV policy with the weights as they are. `gain`: tokens in the same bytes, against 16 bit."""

    policy: int | str
    name: str
    bytes_per_token: int
    gain: float
    tokens: int
    conversations: float  # of session_len


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """Decode tokens/s of all sequences together that the bandwidth allows; `share` of it was measured, None = nothing was."""

    batch: int
    nbytes: int
    ceiling: float
    share: float | None
    fits: bool


@dataclass(frozen=True, slots=True)
class CardSpeed:
    """The ceilings that one known card has; bytes/s, and tokens/s of each batch of `Plan.card_batches`."""

    card: str
    bandwidth: float
    source: str
    ceilings: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Advice:
    """The combination that fits and costs least quality, the commands for it, and what stands against it in this version."""

    fit: Fit
    commands: tuple[str, ...]
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything; sizes in bytes and for one rank. `chosen` are the options as given."""

    model: str
    architecture: str
    parameters: int
    device: str
    memory: int
    bandwidth: float | None
    bandwidth_source: str
    users: int
    context: int
    session_len: int
    max_batch_size: int
    storages: tuple[str, ...]
    parts: tuple[PartRow, ...]
    policies: tuple[PolicyRow, ...]
    chosen: Fit
    lengths: tuple[tuple[int, int], ...]  # (tokens, how many such conversations at once)
    speed_context: int
    speed: tuple[SpeedRow, ...]
    grid: tuple[Fit, ...]
    advice: Advice | None
    least: Fit  # of the grid, the one that needs least with as many ranks
    notes: tuple[str, ...]
    card_batches: tuple[int, ...] = ()
    cards: tuple[CardSpeed, ...] = ()  # only where no bandwidth is known: of the cards with that memory

    @property
    def fits(self) -> bool:
        """Whether the options as given hold the conversations asked for."""
        return not self.chosen.missing


def make_plan(model_path: str | None, config: EngineConfig, wanted: PlanConfig) -> Plan:
    """Read config.json and compute. Raises CheckpointError or ConfigError with one line."""
    folder = resolve_model(model_path, config.download_dir, config.revision, configs_only=True)
    spec, vision = language_spec(folder), load_vision_spec(folder)
    class_of(spec)
    notes = []
    machine = choose_machine(wanted)
    context = wanted.context or config.session_len or min(DEFAULT_CONTEXT, spec.max_position)
    if context > spec.max_position:
        notes.append(f"{context} tokens are beyond the {spec.max_position} positions that the model was made for")
    if config.session_len is not None and context > config.session_len:
        raise ConfigError(f"context={context} is more than session_len={config.session_len}")
    number_bytes = _number_bytes(config.dtype, cpu=machine.cpu)
    subj = subject(spec, vision, config, machine, number_bytes, wanted.users, context)
    choose_format(config.quant_policy, config.kv_rotation, spec.head_dim, machine.capability)
    return _Planner(model_path, folder, subj, wanted.tp, notes).plan()


def _number_bytes(dtype: str, *, cpu: bool) -> int:
    """Bytes of an activation and of an unquantised weight."""
    assert dtype in DTYPES
    return 4 if dtype == "float32" else cpu_number_bytes() if cpu and dtype == "auto" else 2


class _Planner:
    """One subject, looked at from all sides."""

    def __init__(self, model: str | None, folder: Path, subject: Subject, tp: int, notes: list[str]) -> None:
        self.model, self.folder, self.subject, self.tp, self.notes = model, folder, subject, tp, notes
        self.spec, self.config, self.machine = subject.spec, subject.config, subject.machine
        self.as_it_is = self._as_it_is()
        self.candidates = self._candidates()

    def plan(self) -> Plan:
        """All of it."""
        subject, machine = self.subject, self.machine
        chosen = self.fit(self.as_it_is, self.config.quant_policy, self.tp)
        if chosen.note and not chosen.note.startswith("no memory"):  # what is missing is said at the end
            self.notes.append(chosen.note)
        grid = tuple(self._grid())
        storages = tuple(dict.fromkeys((self.as_it_is, *((DENSE, W8, FP8, W4) if not self.spec.quantization else (DENSE,)))))
        context = max(1, subject.context // 2)
        advice = self._advice()
        return Plan(
            str(self.model or self.folder), self.spec.architecture, parameters(self.spec, subject.vision), machine.name, machine.memory, machine.bandwidth, machine.source,
            subject.users, subject.context, chosen.session_len or subject.resolved.session_len or 0, subject.resolved.max_batch_size or 0,
            tuple(s.name for s in storages), tuple(self._parts(storages)), tuple(self._policies()), chosen, tuple(self._lengths(chosen)),
            context, tuple(self._speed(chosen, context)), grid, advice, min((f for f in grid if f.tp == self.tp), key=lambda f: f.need), tuple(self.notes),
            tuple(self._batches()) if machine.cards else (), tuple(self._card_speeds(chosen, context)),
        )  # fmt: skip

    def fit(self, storage: Storage, policy: int | str, tp: int, share: float | None = None) -> Fit:
        """One combination."""
        return try_fit(self.subject, storage, policy, tp, share)

    # -- which weights ------------------------------------------------------------------------------------------------

    def _as_it_is(self) -> Storage:
        """What the options load: as the files are, or as --model-format says."""
        asked, files = self.config.model_format, stored(self.spec)
        if self.spec.quantization or asked in (None, "hf"):
            return files
        return {"fp8": FP8, "smooth-quant": W8}.get(str(asked), W4)

    def _candidates(self) -> list[Storage]:
        """Ways to store the weights that may be recommended, the best first."""
        if self.spec.quantization or self.config.model_format is not None:
            return [self.as_it_is]
        groups_fit = all(m.cols % 128 == 0 and m.rows % 8 == 0 for m in matrices(self.spec) if m.quantised)
        return [DENSE, FP8, W4] if groups_fit else [DENSE, FP8]

    # -- tables -------------------------------------------------------------------------------------------------------

    def _parts(self, storages: tuple[Storage, ...]) -> Iterator[PartRow]:
        columns = [rank_weights(self.subject, storage, self.tp) for storage in storages]
        for part in PARTS:
            if any(column.parts[part] for column in columns):
                yield PartRow(part, tuple(column.parts[part] for column in columns))

    def _policies(self) -> Iterator[PolicyRow]:
        plain = self.fit(self.as_it_is, 0, self.tp)
        for policy in FORMATS:
            fit = self.fit(self.as_it_is, policy, self.tp)
            gain = plain.bytes_per_token / fit.bytes_per_token
            yield PolicyRow(policy, fit.kv, fit.bytes_per_token, gain, fit.tokens, fit.tokens / fit.session_len if fit.session_len else 0.0)

    def _lengths(self, fit: Fit) -> Iterator[tuple[int, int]]:
        size, limit = self.subject.resolved.cache_block_seq_len, self.subject.resolved.session_len or 0
        lengths = {n for n in (2048, 8192, 32768, 131072) if n <= limit} | {self.subject.context, limit}
        for length in sorted(lengths):
            yield length, fit.tokens // (-(-length // size) * size)

    def _speed(self, fit: Fit, context: int) -> Iterator[SpeedRow]:
        if self.machine.bandwidth is None:
            return
        shares = MEASURED_ON_CPU.get(self._kind(), {}) if self.machine.cpu else {}
        for batch in self._batches():
            nbytes = self._read_bytes(fit, batch, context)
            yield SpeedRow(batch, nbytes, batch * self.machine.bandwidth / nbytes, shares.get(batch), batch * context <= fit.tokens)

    def _batches(self) -> list[int]:
        return sorted({*BATCHES, self.subject.users})

    def _read_bytes(self, fit: Fit, batch: int, context: int) -> int:
        """Bytes of a decode step."""
        return rank_weights(self.subject, self.as_it_is, self.tp).read_bytes(batch) + batch * context * fit.bytes_per_token

    def _card_speeds(self, fit: Fit, context: int) -> Iterator[CardSpeed]:
        """Several cards are sold with one size of memory; each reads it at its own pace."""
        sizes = [(batch, self._read_bytes(fit, batch, context)) for batch in self._batches()] if self.machine.cards else []
        for name in self.machine.cards:
            speed = CARDS[name].bandwidth * 1e9
            yield CardSpeed(name, speed, CARDS[name].source, tuple(batch * speed / nbytes for batch, nbytes in sizes))

    def _kind(self) -> str:
        """The row of MEASURED_ON_CPU that these weights belong to."""
        storage = self.as_it_is
        return storage.name if storage.name in MEASURED_ON_CPU else {4: "W4", 8: "W8"}.get(storage.bits, "")

    def _grid(self) -> Iterator[Fit]:
        for storage in self.candidates:
            for policy in POLICIES:
                for tp in dict.fromkeys((*RANKS, self.tp)) if not self.machine.cpu else (self.tp,):
                    try:
                        yield self.fit(storage, policy, tp)
                    except ConfigError:  # ranks that cannot split the model are no part of the grid
                        if tp == self.tp:
                            raise

    # -- advice -------------------------------------------------------------------------------------------------------

    def _advice(self) -> Advice | None:
        """The least costly of the combinations that fit; what the user gave stays."""
        policies = (self.config.quant_policy,) if "quant_policy" in self.config.given else POLICIES
        choices = [(s, p) for s in self.candidates for p in policies]
        choices.sort(key=lambda c: KL_WEIGHTS.get(c[0], 0.0) + KL_POLICIES.get(c[1], 0.0))
        lean = self._lean()
        for storage, policy in choices:
            for size in (self.subject, *([lean] if lean else [])):
                if fit := self._with_share(size, storage, policy):
                    return Advice(fit, tuple(self._commands(size, fit, storage)), self._obstacle())
        return None

    def _lean(self) -> Subject | None:
        """The subject with smaller steps, whose buffers take less: that costs speed under load and no quality. None where the user set both."""
        changes = {name: value for name, value in LEAN.items() if name not in self.config.given and value < getattr(self.subject.resolved, name)}
        if "max_batch_size" in changes:
            changes["max_batch_size"] = max(changes["max_batch_size"], self.subject.users)
        old = self.subject
        config = self.config.replace(**changes)
        return subject(self.spec, old.vision, config, self.machine, old.number_bytes, old.users, old.context) if changes else None

    def _with_share(self, subject: Subject, storage: Storage, policy: int | str) -> Fit | None:
        """A fit, with a larger share of the free memory where the usual one is just not enough."""
        fit = try_fit(subject, storage, policy, self.tp)
        if not fit.missing:
            return fit
        if "cache_max_entry_count" in self.config.given:
            return None
        for hundredths in range(int(100 * fit.share) + 1, int(100 * MAX_SHARE) + 1):
            if not (larger := try_fit(subject, storage, policy, self.tp, hundredths / 100)).missing:
                return larger
        return None

    def _obstacle(self) -> str:
        if self.tp not in UNUSED_VALUES.get("tp", (self.tp,)):
            return f"tp={self.tp} is not available in this version of lmdeploy"
        return ""

    def _commands(self, subject: Subject, fit: Fit, storage: Storage) -> Iterator[str]:
        """What to type."""
        config, model = subject.config, [self.model] if self.model is not None else []
        if storage is W4 and not self.spec.quantization:
            copy = f"{self.folder.name}-4bit"
            yield shlex.join(["lmdeploy", "lite", "auto_awq", *model, "--search-scale", "True", "--work-dir", copy])
            model = [copy]
        words = ["lmdeploy", "serve", "api_server", *model]
        formats = {W4: "awq", FP8: "fp8"}
        if storage in formats and not (storage is FP8 and self.spec.quantization):
            words += ["--model-format", formats[storage]]
        if fit.policy != 0:
            words += ["--quant-policy", "fp8" if fit.policy == 16 else str(fit.policy)]
        if config.head_bits != 16:
            words += ["--head-bits", str(config.head_bits)]
        if "session_len" in config.given or subject.context > self.spec.max_position:
            words += ["--session-len", str(subject.resolved.session_len if "session_len" in config.given else subject.context)]
        if "max_batch_size" in config.given or subject.users > (256 if not self.machine.cpu else 32):
            words += ["--max-batch-size", str(subject.resolved.max_batch_size)]
        if "max_prefill_token_num" in config.given:
            words += ["--max-prefill-token-num", str(config.max_prefill_token_num)]
        if "cache_max_entry_count" in config.given or fit.share != config.cache_max_entry_count:
            words += ["--cache-max-entry-count", f"{fit.share:g}"]
        if fit.tp > 1:
            words += ["--tp", str(fit.tp)]
        yield shlex.join(words)


def shortage(plan: Plan) -> str:
    """One line: by how much the options as given do not fit, and the least that would do."""
    fit, least = plan.chosen, plan.least
    text = f"{fit.weights} weights with a {_bits(fit.kv)} KV cache need {gib(fit.need)} for {asked(plan)}, {gib(fit.missing)} more than there is"
    if plan.advice is None:
        ranks = f" on each of {least.tp} GPUs" if least.tp > 1 else ""
        text += f"; the least need is {gib(least.need)}{ranks}: {least.weights} weights, {_bits(least.kv)} KV cache"
    return text


def _bits(kv: str) -> str:
    return "16-bit" if kv == "none" else kv


def asked(plan: Plan) -> str:
    """The conversations that shall fit."""
    return f"{plan.users} conversation{'s' if plan.users > 1 else ''} of {plan.context} tokens"
