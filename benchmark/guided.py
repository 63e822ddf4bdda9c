"""Guided decoding: the grammar library in use beside xgrammar, and what guided requests cost the engine: `python -m benchmark.guided`.

Both libraries get the same vocabularies (bytes of each id), schemas and texts. `--tokenizers` is a folder of model folders with large vocabularies;
without it only the embedded model's 5,120 tokens are measured. xgrammar is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark import common
from lmdeploy.checkpoint.hub import resolve_model
from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.grammar_compiler import GrammarCompiler
from lmdeploy.engine.guided import GuidedSlots, GuidedStep, StepMask, forbid
from lmdeploy.engine.mask_pool import MOST_PROCESSES, MaskPool
from lmdeploy.engine.plan import LATE
from lmdeploy.engine.start import build_engine
from lmdeploy.errors import RequestError
from lmdeploy.grammar import Grammar, grammar_of
from lmdeploy.messages import EngineRequest, SamplingParams
from lmdeploy.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LARGE = {
    "type": "object",
    "properties": {f"field_{i}": {"anyOf": [PERSON, {"type": "array", "items": {"enum": [f"v{j}" for j in range(20)]}}]} for i in range(100)},
    "required": [f"field_{i}" for i in range(100)],
    "additionalProperties": False,
}
SCHEMAS = {
    "small: 2 properties": PERSON,
    "large: 100 properties, 27 kB": LARGE,
    "200 optional properties": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(200)}},
    "maxLength 20,000": {"type": "string", "maxLength": 20_000},
    "pattern ((a{0,50}){0,50}){0,50}": {"type": "string", "pattern": "^((a{0,50}){0,50}){0,50}$"},
    "allOf of itself": {"allOf": [{"$ref": "#"}]},
    "multipleOf 99,991": {"type": "integer", "multipleOf": 99_991},
}
TEXT = '{"name": "Ada Lovelace, née", "age": 36}'
#: keyword -> (schema, a text that breaks it)
KEYWORDS: dict[str, tuple[Any, str]] = {
    "required": ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, "{}"),
    "additionalProperties": ({"type": "object", "additionalProperties": False}, '{"b": 1}'),
    "patternProperties": ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}, '{"x1": "a"}'),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^x"}}, '{"y": 1}'),
    "minProperties": ({"type": "object", "minProperties": 1}, "{}"),
    "maxProperties": ({"type": "object", "maxProperties": 1}, '{"a": 1, "b": 1}'),
    "dependentRequired": ({"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
    "minItems": ({"type": "array", "minItems": 1}, "[]"),
    "maxItems": ({"type": "array", "maxItems": 1}, "[1, 2]"),
    "uniqueItems": ({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}, "[1, 1]"),
    "contains": ({"type": "array", "contains": {"type": "integer"}}, '["a"]'),
    "minLength": ({"type": "string", "minLength": 2}, '"a"'),
    "pattern": ({"type": "string", "pattern": "^a+$"}, '"b"'),
    "format": ({"type": "string", "format": "date"}, '"x"'),
    "minimum": ({"type": "integer", "minimum": 3}, "2"),
    "number minimum": ({"type": "number", "minimum": 3}, "2.5"),
    "multipleOf": ({"type": "integer", "multipleOf": 3}, "4"),
    "const": ({"const": 5}, "6"),
    "allOf": ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, "7"),
    "oneOf": ({"oneOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]}, "4"),
    "not": ({"type": "integer", "not": {"const": 4}}, "4"),
    "if": ({"type": "integer", "if": {"minimum": 3}, "then": {"maximum": 5}}, "7"),
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, '"a"'),
    "remote $ref": ({"$ref": "https://example.com/schema.json"}, "1"),
}


class Matcher:
    """What both libraries' matchers can do."""

    def __init__(self, fill: Callable[[], Any], accept: Callable[[int], bool], ended: Callable[[], bool]) -> None:
        self.fill, self.accept, self.ended = fill, accept, ended


@dataclass
class Library:
    """One library over one vocabulary."""

    name: str
    seconds: float  # to take in the vocabulary
    compile: Callable[[Any], Callable[[], Matcher]]  # raises for what it refuses


def llguidance_on(tokenizer: Tokenizer) -> Library:
    start = time.perf_counter()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)

    def compile_schema(schema: Any) -> Callable[[], Matcher]:
        grammar = Grammar("json_schema", json.dumps(schema))
        first, _ = compiler._compile(grammar)  # not the kept one

        def make() -> Matcher:
            matcher = first.deep_copy()
            return Matcher(matcher.compute_bitmask, matcher.consume_token, matcher.is_accepting)

        return make

    return Library("llguidance", time.perf_counter() - start, compile_schema)


def xgrammar_on(tokenizer: Tokenizer) -> Library | None:
    try:
        import xgrammar
    except ImportError:
        return None
    vocabulary = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    start = time.perf_counter()
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[tokenizer.eos_token_id])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile_schema(schema: Any) -> Callable[[], Matcher]:
        compiled = compiler.compile_json_schema(json.dumps(schema))
        mask = xgrammar.allocate_token_bitmask(1, tokenizer.vocab_size)

        def make() -> Matcher:
            matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
            return Matcher(lambda: matcher.fill_next_token_bitmask(mask), matcher.accept_token, matcher.is_terminated)

        return make

    return Library("xgrammar", time.perf_counter() - start, compile_schema)


# ---------------------------------------------------------------------- measurements


def imports() -> None:
    for name in ("llguidance", "xgrammar"):
        code = (
            "import time, psutil, torch, numpy\nrss = lambda: psutil.Process().memory_info().rss\n"
            f"s, m = time.perf_counter(), rss()\nimport {name}\nprint(f'{{(time.perf_counter() - s) * 1e3:.0f}} ms, {{(rss() - m) / 1e6:.0f}} MB')"
        )
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False) for _ in range(3)]
        print(f"import {name} behind torch: {sorted(r.stdout.strip() for r in runs)[1] or 'not installed'}")


def schemas(library: Library, limit: float) -> None:
    for name, schema in SCHEMAS.items():
        start = time.perf_counter()
        try:
            make = library.compile(schema)
            seconds = time.perf_counter() - start
            first = time.perf_counter()
            make().fill()
            print(f"  {name}: compile {seconds * 1e3:.1f} ms, first mask {(time.perf_counter() - first) * 1e3:.2f} ms")
        except (RequestError, RuntimeError, ValueError) as e:
            print(f"  {name}: refused after {(time.perf_counter() - start) * 1e3:.1f} ms: {' '.join(str(e).split())[:100]}")
        if time.perf_counter() - start > limit:
            print("  (the rest is left out)")
            return


def masks(library: Library, tokenizer: Tokenizer) -> None:
    ids = longest_pieces(tokenizer, TEXT)
    make = library.compile(PERSON)
    cold, warm = [], []
    for times in (cold, warm, warm):
        matcher = make()
        for token in ids:
            start = time.perf_counter()
            matcher.fill()
            times.append(time.perf_counter() - start)
            if not matcher.accept(token):
                break
    print(
        f"  masks of {len(cold)} tokens of {TEXT}: median {statistics.median(warm) * 1e6:.0f} us, most {max(warm) * 1e6:.0f} us; first run most {max(cold) * 1e6:.0f} us"
    )


def keywords(library: Library, tokenizer: Tokenizer) -> None:
    found: dict[str, list[str]] = {"kept": [], "refused": [], "passed over": []}
    for name, (schema, text) in KEYWORDS.items():
        try:
            matcher = library.compile(schema)()
        except (RequestError, RuntimeError, ValueError):
            found["refused"].append(name)
            continue
        fits = all(matcher.accept(i) for i in longest_pieces(tokenizer, text, 1)) and matcher.ended()
        found["passed over" if fits else "kept"].append(name)
    for kind, names in found.items():
        print(f"  {kind} ({len(names)}): {', '.join(names)}")


def longest_pieces(tokenizer: Tokenizer, text: str, most: int = 16) -> list[int]:
    """The text in the longest tokens that fit, from left to right."""
    places = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size)) if i not in tokenizer.special_ids}
    rest, ids = text.encode(), []
    while rest:
        piece = next(rest[:n] for n in range(most, 0, -1) if rest[:n] in places)
        ids.append(places[piece])
        rest = rest[len(piece) :]
    return ids


def records(length: int | None) -> dict[str, Any]:
    name = {"type": "string"} if length is None else {"type": "string", "maxLength": length}
    person = {**PERSON, "properties": {**PERSON["properties"], "name": name}}  # type: ignore[dict-item]
    return {"type": "array", "items": person, "minItems": 50}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


FORMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "any text": {"type": "regex_schema", "regex_schema": r"(.|\n)*"},
    "JSON object": {"type": "json_object"},
    "records": form(records(None)),
    "string of 1,500 to 2,000": form({"type": "string", "minLength": 1500, "maxLength": 2000}),
    "records, maxLength 200": form(records(200)),
    "records, maxLength 20": form(records(20)),
}


def run_guided(engine: Engine, prompts: list[list[int]], stops: tuple[int, ...], response_format: dict[str, Any] | None, first_id: int) -> tuple[float, ...]:
    """Tokens/s; milliseconds until all answers have begun, of a step from then on (mean, median), and of processor time; late tokens in percent."""
    grammar = None if response_format is None else grammar_of(response_format)
    before, start, cpu = engine.stats(), time.perf_counter(), time.process_time()
    for i, ids in enumerate(prompts):
        sampling = SamplingParams(max_new_tokens=120, ignore_eos=True, temperature=0.8, top_k=40, top_p=0.8, seed=i, stop_token_ids=stops, grammar=grammar)
        engine.add(EngineRequest(request_id=first_id + i, token_ids=ids, sampling=sampling))
    begun: set[int] = set()
    times: list[float] = []
    while engine.has_work:
        for output in engine.step().others:  # with the first and last output of each
            if output.error:
                raise RuntimeError(output.error)
            begun.add(output.request_id)
        if len(begun) == len(prompts):
            times.append(time.perf_counter())
    after, steps = engine.stats(), np.diff(times) * 1e3
    tokens, count = after.generated_tokens - before.generated_tokens, after.steps - before.steps
    late = (after.late_tokens - before.late_tokens) / tokens * 100
    return tokens / (times[-1] - start), (times[0] - start) * 1e3, float(steps.mean()), float(np.median(steps)), (time.process_time() - cpu) / count * 1e3, late


def engines(folder: Path, config: TurbomindEngineConfig, options: argparse.Namespace) -> None:
    """An engine that has its process to itself, as a server's has."""
    tokenizer, engine = Tokenizer(folder), build_engine(folder, config)
    stops = tuple(i for i in (tokenizer.eos_token_id,) if i is not None)
    print(common.prepare_ahead(engine))
    number = 1
    for batch in options.batch:
        prompts = [tokenizer.encode(f"Tell me a story about {i} animals.", add_bos=True) for i in range(batch)]
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in FORMS}
        for _ in range(options.repeats + 1):
            for name, response_format in FORMS.items():
                found[name].append(run_guided(engine, prompts, stops, response_format, number))
                number += batch
        for name, values in found.items():
            rate, first, mean, median, cpu, late = (statistics.median(column) for column in zip(*values[1:], strict=True))
            print(
                f"  batch {batch}, {name}: {rate:.0f} tok/s, all begun after {first:.1f} ms, then {mean:.2f} ms a step (median {median:.2f}), {cpu:.2f} ms of processor time "
                f"a step, {late:.1f} % of the tokens late; the first time, with nothing found out about the grammar, {values[0][1]:.1f} and {values[0][2]:.2f} ms"
            )
    engine.close()


# ---------------------------------------------------------------------- masks beside steps, without a model


@dataclass
class Waits:
    """What the masks of some answers do to steps of so many seconds."""

    follow: list[float]  # seconds to take tokens in, until the last call has begun
    over: list[float]  # by which the masks keep the next step waiting
    late: int = 0
    rows: int = 0


def beside_steps(pool: MaskPool, slots: GuidedSlots, response_format: dict[str, Any], rows: int, seconds: float, steps: int, plans: float = 3e-4) -> Waits:
    """Follow answers of random tokens as an engine on a GPU does, whose steps take so long and whose host is busy for `plans` of it, planning. The first half of the
    steps is not counted: lexers are cold."""
    found, draw, grammar = Waits([], []), np.random.default_rng(0), grammar_of(response_format)
    assert grammar is not None
    held = pool.prepare(grammar, answers=rows)
    held.result()

    def tokens(step: GuidedStep) -> NDArray[np.int64]:
        chosen = np.full(rows, LATE)
        bits = step.words.numpy().view(np.uint32)
        for place in np.flatnonzero(~step.late).tolist():
            allowed = np.flatnonzero(np.unpackbits(bits[step.slots[place]].view(np.uint8), bitorder="little"))
            allowed = allowed[allowed != pool.eos_token_id]
            chosen[step.rows[place]] = draw.choice(allowed) if allowed.size and not step.ended[place] else pool.eos_token_id
        return chosen

    ended, before = list(range(rows)), None
    for number in range(steps):
        chosen = None if before is None else tokens(before)
        for slot in ended:
            slots.set(slot, SamplingParams(max_new_tokens=1 << 20, grammar=grammar), [])
        step = slots.masks(np.arange(rows), np.zeros(rows, dtype=bool))
        assert step is not None
        ended = []
        if before is not None and chosen is not None:
            step.late[:] = True  # all of them may be
            start = time.perf_counter()
            step.busy, step.paced = lambda end=start + seconds: time.perf_counter() < end, True  # type: ignore[misc]
            complete = slots.follow(before, chosen)
            followed = time.perf_counter()
            while time.perf_counter() < followed + plans:
                pass
            step.join()
            over = time.perf_counter() - start - seconds
            slots.launched(step)
            step.waited = time.perf_counter() < start + seconds
            while time.perf_counter() < start + seconds:
                pass
            ended = [row for row, done in zip(before.rows.tolist(), complete, strict=True) if done or chosen[row] == pool.eos_token_id]
            if number >= steps // 2:
                found.follow.append(followed - start)
                found.over.append(max(over, 0.0))
                found.late, found.rows = found.late + int(step.late.sum()), found.rows + rows
        else:
            step.join()
        before = step
    for slot in range(rows):
        slots.release(slot)
    return found


def waits(folder: Path, rows: int, milliseconds: list[float], steps: int) -> None:
    pool = MaskPool(folder, Tokenizer(folder).vocab_size)
    slots = GuidedSlots.of(pool, rows, torch.device("cpu"))
    for name in ("records", "string of 1,500 to 2,000", "records, maxLength 200", "records, maxLength 20"):
        response_format = FORMS[name]
        assert response_format is not None
        for step in milliseconds:
            w = beside_steps(pool, slots, response_format, rows, step / 1e3, steps)
            mean, most = statistics.mean(w.over) * 1e3, sorted(w.over)[len(w.over) * 9 // 10] * 1e3
            print(
                f"  {rows} answers, steps of {step:g} ms, {name}: tokens taken in and masks begun in {statistics.median(w.follow) * 1e3:.2f} ms, "
                f"steps longer by {mean:.3f} ms (mean; the slowest tenth {most:.3f} and more), {w.late / w.rows:.1%} of the tokens late"
            )
    slots.close()


def apply_masks() -> None:
    for rows, size in ((1, 5120), (32, 5120), (1, 92544), (32, 92544)):
        words = torch.randint(-(2**31), 2**31 - 1, (rows, -(-size // 32)), dtype=torch.int32)
        logits = torch.zeros(rows, size)
        mask = StepMask(np.arange(rows), words)
        seconds = common.timed(lambda logits=logits, mask=mask: forbid(logits, mask), 21)  # type: ignore[misc]
        best = common.timed(lambda logits=logits: logits.max(dim=-1), 21)  # type: ignore[misc]
        print(f"  {rows} x {size}: {seconds * 1e3:.3f} ms (the greedy choice alone: {best * 1e3:.3f} ms)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizers", type=Path, help="folder of model folders")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for a schema after which a library's other schemas are left out")
    parser.add_argument("--engine", metavar="MODEL", help="measure only what grammars cost this model's engine")
    parser.add_argument("--random-weights", action="store_true", help="with --engine: the folder needs no weights")
    parser.add_argument("--waits", type=Path, metavar="TOKENIZER", help="measure only what masks do to steps of a GPU, without one: a folder with a tokenizer")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[1.5, 3.0], help="with --waits: how long a step takes")
    parser.add_argument("--steps", type=int, default=600, help="with --waits")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    if options.engine:
        print(common.machine())
        engines(
            resolve_model(options.engine, None, None), TurbomindEngineConfig(max_batch_size=max(options.batch), random_weights=options.random_weights), options
        )
        return
    if options.waits:
        print(f"{common.machine()}; {os.cpu_count()} processors, {MOST_PROCESSES} processes at most fill masks")
        for rows in options.batch:
            waits(options.waits, rows, options.step_ms, options.steps)
        return
    embedded = resolve_model(None, None, None)
    print(f"{common.machine()}; busy cores {common.busy_cores():.1f}")
    imports()
    for folder in [embedded, *(sorted(options.tokenizers.iterdir()) if options.tokenizers else [])]:
        tokenizer = Tokenizer(folder)
        for library in filter(None, (llguidance_on(tokenizer), xgrammar_on(tokenizer))):
            print(f"{folder.name}, {tokenizer.vocab_size} tokens, {library.name}: vocabulary {library.seconds * 1e3:.0f} ms")
            schemas(library, options.limit)
            masks(library, tokenizer)
            if folder == embedded:
                keywords(library, tokenizer)
    print("masks applied to logits on this CPU:")
    apply_masks()
    print("the engine, embedded model:")
    engines(embedded, TurbomindEngineConfig(max_batch_size=32, cpu_threads=1), options)


if __name__ == "__main__":
    main()
