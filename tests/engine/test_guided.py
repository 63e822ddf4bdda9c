"""Answers that must fit a grammar: whatever the form, the sampling and the fate of the sequence, the text fits, and others do not notice."""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lmdeploy import GenerationConfig, Pipeline
from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.guided import GuidedSlots
from lmdeploy.engine.masks import Flags, Ints
from lmdeploy.engine.start import build_engine
from lmdeploy.grammar import Grammar
from lmdeploy.messages import EngineOutput, EngineRequest, Response, SamplingParams
from lmdeploy.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PROMPT = [{"role": "user", "content": "Tell me about a person."}]


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def ask(pipe: Pipeline, **options: Any) -> Response:
    answer = pipe(PROMPT, gen_config=GenerationConfig(**{"max_new_tokens": 200, **options}))
    assert isinstance(answer, Response)
    return answer


def fits(answer: Response, schema: Any) -> Any:
    assert answer.finish_reason == "stop", answer
    value = json.loads(answer.text)
    jsonschema.validate(value, schema, cls=jsonschema.Draft202012Validator)
    return value


# ------------------------------------------------------------------ forms


def test_a_json_schema_is_kept_greedily_and_when_sampling(pipe: Pipeline) -> None:
    for options in ({}, {"temperature": 1.0, "random_seed": 3}, {"temperature": 1.5, "top_k": 0, "random_seed": 4}, {"top_p": 0.5, "random_seed": 5}):
        fits(ask(pipe, response_format=form(PERSON), **options), PERSON)


def test_penalties_and_log_probabilities_go_with_a_grammar(pipe: Pipeline) -> None:
    answer = ask(pipe, response_format=form(PERSON), repetition_penalty=1.3, frequency_penalty=0.5, logprobs=3)
    fits(answer, PERSON)
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
    assert all(token in entry for token, entry in zip(answer.token_ids, answer.logprobs, strict=True))


def test_json_object_is_any_object(pipe: Pipeline) -> None:
    found = [ask(pipe, response_format={"type": "json_object"}, temperature=1.0, random_seed=seed) for seed in range(8)]
    whole = [json.loads(a.text) for a in found if a.finish_reason == "stop"]
    assert all(a.text.startswith("{") for a in found) and all(isinstance(value, dict) for value in whole)


@pytest.mark.parametrize(
    "pattern", [r"call me [A-Za-z]{1,10}", r"\d{3}-\d{4}", r"(yes|no)[.!]", r"[а-я]{3,6} [一-龥]{2}", r'a/b "\\n" {2}', r"(😀|é){2}", r"x*"]
)
def test_the_whole_answer_matches_a_regex(pipe: Pipeline, pattern: str) -> None:
    for seed in range(3):
        answer = ask(pipe, response_format={"type": "regex_schema", "regex_schema": pattern}, temperature=1.0, random_seed=seed, max_new_tokens=60)
        if pattern != "x*" or answer.finish_reason == "stop":
            assert answer.finish_reason == "stop" and re.fullmatch(pattern, answer.text), answer


def test_an_answer_is_one_of_the_choices(pipe: Pipeline) -> None:
    choices = ["red", "green", 'zero /\\ "\n', "日本語", "🙂 no"]
    seen = {ask(pipe, response_format={"type": "choice", "choice": choices}, temperature=2.0, top_k=0, random_seed=seed).text for seed in range(12)}
    assert seen <= set(choices) and len(seen) > 1


@pytest.mark.parametrize("text", ['root ::= item ("," item)*\nitem ::= [a-c] [0-9]', 'start: item ("," item)*\nitem: /[a-c][0-9]/'], ids=["gbnf", "lark"])
def test_an_ebnf_grammar_is_kept(pipe: Pipeline, text: str) -> None:
    answer = ask(pipe, response_format={"type": "ebnf", "ebnf": text}, temperature=1.0, random_seed=1, max_new_tokens=40)
    assert re.fullmatch(r"([a-c]\d,)*([a-c]\d?)?", answer.text)
    assert answer.finish_reason == "length" or re.fullmatch(r"[a-c]\d(,[a-c]\d)*", answer.text)


def schemas() -> st.SearchStrategy[Any]:
    """Small schemas of every kind; strings and arrays are short so that the tiny model gets to their end."""
    names = st.sampled_from(["a", "b b", 'q"', "ключ", "日"])
    leaf = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, st.integers(-50, 50), st.integers(0, 200)),
        st.just({"type": "number", "minimum": -1, "maximum": 1}),
        st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, st.integers(0, 3), st.integers(0, 4)),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}),
        st.just({"type": "string", "format": "date"}),
        st.builds(lambda v: {"enum": v}, st.lists(st.sampled_from(["x", "é", 1, 2.5, None, True, "a\nb"]), min_size=1, max_size=3, unique_by=repr)),
        st.builds(lambda v: {"const": v}, st.sampled_from(["k", 7, {"a": [1]}])),
    )

    def grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        def shape(properties: dict[str, Any], closed: bool) -> Any:
            return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False if closed else {"type": "boolean"},
                    "maxProperties": len(properties) + 1}  # fmt: skip

        return st.one_of(
            st.builds(shape, st.dictionaries(names, inner, max_size=3), st.booleans()),
            st.builds(lambda i, n: {"type": "array", "items": i, "minItems": n, "maxItems": n + 2}, inner, st.integers(0, 2)),
            st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
            st.builds(lambda a, b: {"type": "array", "prefixItems": [a, b], "items": False, "minItems": 2}, inner, inner),
        )

    whole = st.recursive(leaf, grow, max_leaves=4)
    return whole | st.builds(
        lambda a, b: {"type": "array", "items": {"$ref": "#/$defs/x"}, "maxItems": 2, "allOf": [b], "$defs": {"x": a}}, whole, st.just({"minItems": 1})
    )


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas(), seed=st.integers(0, 1000))
def test_whatever_the_schema_the_answer_is_valid(pipe: Pipeline, schema: Any, seed: int) -> None:
    answer = ask(pipe, response_format=form(schema), temperature=0.8, random_seed=seed, max_new_tokens=400)
    if answer.finish_reason != "length":
        fits(answer, schema)


# ------------------------------------------------------------------ the end of an answer


def test_a_complete_answer_ends_at_once_whatever_min_new_tokens_and_ignore_eos_say(pipe: Pipeline) -> None:
    for options in ({"min_new_tokens": 150}, {"ignore_eos": True}, {"ignore_eos": True, "temperature": 1.0, "random_seed": 1}):
        fits(ask(pipe, response_format=form(PERSON), **options), PERSON)


def test_an_answer_that_can_only_be_empty_ends_at_once(pipe: Pipeline) -> None:
    for options in ({}, {"min_new_tokens": 5}, {"ignore_eos": True}):
        answer = ask(pipe, response_format={"type": "regex_schema", "regex_schema": "()"}, max_new_tokens=9, **options)
        assert (answer.text, answer.finish_reason) == ("", "stop") and answer.generate_token_len <= 1


def test_a_last_token_that_is_no_stop_token_stays_in_the_answer(pipe: Pipeline) -> None:
    answer = ask(pipe, response_format={"type": "choice", "choice": ["only this"]})
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("only this", "stop", None)


def test_a_grammar_that_could_go_on_ends_where_the_model_stops_or_at_the_limit(pipe: Pipeline) -> None:
    free = {"type": "regex_schema", "regex_schema": r"(.|\n)*"}
    plain, guided = ask(pipe, max_new_tokens=60), ask(pipe, max_new_tokens=60, response_format=free)
    assert (plain.text, plain.finish_reason, plain.stop_reason) == (guided.text, guided.finish_reason, guided.stop_reason)
    cut = ask(pipe, max_new_tokens=5, response_format=form(PERSON))
    assert (cut.finish_reason, cut.generate_token_len) == ("length", 5)


def test_min_new_tokens_holds_while_the_grammar_can_go_on(pipe: Pipeline) -> None:
    answer = ask(pipe, min_new_tokens=30, max_new_tokens=40, response_format={"type": "regex_schema", "regex_schema": "[a-z ]+"})
    assert 30 <= answer.generate_token_len <= 41 and re.fullmatch("[a-z ]+", answer.text)


def test_the_grammar_begins_behind_after(pipe: Pipeline) -> None:
    ids = {}
    for after in (" I", "<|action_end|>", "ny"):  # a text, a special token, and the end of a token or of a word
        grammar = Grammar("choice", '[" [yes]", "[no]"]', after=after)
        answer = ask(pipe, grammar=grammar, skip_special_tokens=False, spaces_between_special_tokens=False, max_new_tokens=100)
        ids[after] = answer
        if answer.finish_reason == "stop":
            before, found, behind = answer.text.partition(after)
            assert found and behind in (" [yes]", "[no]"), answer.text
    assert ids[" I"].finish_reason == "stop"


# ------------------------------------------------------------------ structural tags


def tags(mode: str, *, parallel: bool, end: str = "<|action_end|>", begin: str = '<|action_start|><|plugin|>\n{"name": "f", "parameters": ') -> Grammar:
    return Grammar(
        "structural_tag",
        json.dumps(
            {
                "mode": mode,
                "parallel": parallel,
                "triggers": ["<|action_start|>"],
                "tags": [{"begin": begin, "schema": PERSON, "end": end}, {"begin": begin.replace('"f"', '"g"'), "schema": PERSON, "end": end}],
            }
        ),
    )


def special(answer: Response, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token_text(i) for i in answer.token_ids if i in tokenizer.special_ids]


@pytest.mark.parametrize("end", ["}", "}<|action_end|>"], ids=["closed by the stop token", "end is the stop token"])
@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"temperature": 1.0, "random_seed": 2}])
def test_a_required_tag_comes_from_the_first_token_on_with_its_special_tokens(pipe: Pipeline, options: dict[str, Any], end: str) -> None:
    answer = ask(pipe, grammar=tags("required", parallel=False, end=end), **options)
    assert answer.finish_reason == "stop"
    assert special(answer, pipe.tokenizer)[:2] == ["<|action_start|>", "<|plugin|>"]
    call = json.loads(answer.text)
    assert call["name"] in ("f", "g")
    jsonschema.validate(call["parameters"], PERSON)


def test_auto_leaves_the_text_free_until_a_trigger_comes(pipe: Pipeline) -> None:
    plain = ask(pipe)
    assert ask(pipe, grammar=tags("auto", parallel=True)).text == plain.text
    start = pipe.tokenizer.added_token_id("<|action_start|>")
    for parallel in (False, True):
        pushed = ask(pipe, grammar=tags("auto", parallel=parallel, end="}"), logit_bias={start: 100.0}, max_new_tokens=60)
        assert special(pushed, pipe.tokenizer)[:2] == ["<|action_start|>", "<|plugin|>"]
        assert re.match(r'\n\{"name": "[fg]", "parameters": \{', pushed.text)
        if not parallel:
            jsonschema.validate(json.loads(pushed.text)["parameters"], PERSON)


def test_text_triggers_are_seen_wherever_tokens_are_cut(pipe: Pipeline) -> None:
    text = json.dumps({"mode": "auto", "parallel": False, "triggers": [" I"], "tags": [{"begin": " I say ", "schema": {"const": 5}, "end": "!"}]})
    answer = ask(pipe, grammar=Grammar("structural_tag", text), max_new_tokens=100)
    assert " I" not in answer.text or re.search(r" I say 5!$", answer.text)
    parallel = Grammar("structural_tag", text.replace("false", "true"))
    for piece in ask(pipe, grammar=parallel, max_new_tokens=60).text.split(" I")[1:-1]:
        assert piece.startswith(" say 5!")


def test_required_tags_in_parallel_are_separated_by_space_only(pipe: Pipeline) -> None:
    tag = {"begin": "<call>", "schema": {"enum": [1, 2]}, "end": "</call>"}
    grammar = Grammar("structural_tag", json.dumps({"mode": "required", "parallel": True, "triggers": [], "tags": [tag]}))
    answer = ask(pipe, grammar=grammar, max_new_tokens=80, temperature=1.0, random_seed=1)
    assert re.fullmatch(r"(<call>[12]</call>\s*)+(<call>?.*)?", answer.text)


def test_a_tag_without_schema_holds_any_text_up_to_its_end(pipe: Pipeline) -> None:
    for end in ("<|action_end|>", "."):
        tag = {"begin": "<|action_start|><|interpreter|>\n", "schema": None, "end": end}
        grammar = Grammar("structural_tag", json.dumps({"mode": "required", "parallel": False, "triggers": [], "tags": [tag]}))
        answer = ask(pipe, grammar=grammar, max_new_tokens=60)
        assert special(answer, pipe.tokenizer)[:2] == ["<|action_start|>", "<|interpreter|>"]
        assert end != "." or answer.finish_reason == "length" or answer.text.endswith(".")


# ------------------------------------------------------------------ together with other limits


def test_a_token_must_satisfy_grammar_and_bad_words_or_the_answer_ends_with_an_error(pipe: Pipeline) -> None:
    yes_no = {"type": "choice", "choice": ["yes", "no"]}
    letters = [i for i in range(pipe.tokenizer.vocab_size) if pipe.tokenizer.token_bytes(i)[:1] == b"y"]
    assert ask(pipe, response_format=yes_no, bad_token_ids=letters).text == "no"
    letters += [i for i in range(pipe.tokenizer.vocab_size) if pipe.tokenizer.token_bytes(i)[:1] == b"n"]
    stuck = ask(pipe, response_format=yes_no, bad_token_ids=letters)
    assert (stuck.finish_reason, stuck.error_code) == ("error", "grammar_failed") and "bad_words" in str(stuck.error_message)


def test_a_biased_token_that_the_grammar_forbids_does_not_come(pipe: Pipeline) -> None:
    q = pipe.tokenizer.token_id("q")
    assert ask(pipe, response_format={"type": "choice", "choice": ["yes", "no"]}, logit_bias={q: 100.0}).text in ("yes", "no")


def test_n_answers_each_have_their_own_state(pipe: Pipeline) -> None:
    answers = pipe([PROMPT], gen_config=GenerationConfig(n=6, temperature=1.3, random_seed=9, max_new_tokens=200, response_format=form(PERSON)))
    assert len({json.dumps(fits(a, PERSON)) for a in answers}) > 1


def test_a_batch_of_all_kinds_gives_what_each_gives_alone(pipe: Pipeline) -> None:
    kinds: list[dict[str, Any]] = [
        {"response_format": form(PERSON)},
        {},
        {"response_format": {"type": "choice", "choice": ["a", "b"]}},
        {"temperature": 1.0, "random_seed": 5},
        {"response_format": {"type": "regex_schema", "regex_schema": "[a-z]{20}"}, "temperature": 1.0, "random_seed": 7},
    ]
    configs = [GenerationConfig(max_new_tokens=50, **kind) for kind in kinds] * 2
    together = pipe([PROMPT] * len(configs), gen_config=configs)
    alone = [pipe(PROMPT, gen_config=config) for config in configs]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_a_guided_batch_takes_little_more_processor_time_than_a_plain_one(pipe: Pipeline) -> None:
    """benchmark/RESULTS.md has the figures; here only what would be a fault: a step that takes half as long again."""
    records = form({"type": "array", "items": PERSON, "minItems": 30})

    def cost(response_format: dict[str, Any] | None) -> float:
        gen = GenerationConfig(max_new_tokens=40, temperature=0.8, random_seed=1, ignore_eos=True, response_format=response_format)
        start = time.process_time()
        answers = pipe([PROMPT] * 8, gen_config=gen)
        assert all(a.generate_token_len == 40 for a in answers)
        return time.process_time() - start

    cost(records)
    pairs = [(cost(None), cost(records)) for _ in range(4)]
    assert min(guided for _, guided in pairs) < 1.5 * min(plain for plain, _ in pairs), pairs


def test_a_grammar_that_cannot_be_compiled_harms_no_other_request(pipe: Pipeline) -> None:
    configs = [GenerationConfig(max_new_tokens=20), GenerationConfig(response_format=form({"not": {"type": "string"}})), GenerationConfig(max_new_tokens=20)]
    first, bad, last = pipe([PROMPT] * 3, gen_config=configs)
    assert (bad.error_code, first.text) == ("invalid_grammar", last.text) and first.text and "not" in str(bad.error_message)


# ------------------------------------------------------------------ inside the engine


@pytest.fixture
def engine(model_folder: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """A small engine; the parameter is further options."""
    options = {
        "dtype": "float32",
        "device_type": "cpu",
        "max_batch_size": 8,
        "cache_max_entry_count": 200,
        "cache_block_seq_len": 8,
        "max_prefill_token_num": 256,
        **getattr(request, "param", {}),
    }
    built = build_engine(model_folder, TurbomindEngineConfig(**options))
    yield built
    built.close()


def guided(request_id: int, *, prompt: int = 20, grammar: Grammar | None = Grammar("json_schema", json.dumps(PERSON)), **options: Any) -> EngineRequest:  # noqa: B008
    sampling = SamplingParams(**{"max_new_tokens": 120, "grammar": grammar, "stop_token_ids": (2,), "temperature": 1.0, "seed": request_id, **options})
    return EngineRequest(request_id=request_id, token_ids=[1, *((13 * k + request_id) % 4000 + 300 for k in range(prompt))], sampling=sampling)


def run(engine: Engine) -> dict[int, list[EngineOutput]]:
    found: dict[int, list[EngineOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
        engine.scheduler.check_integrity()
    return found


def tokens(outputs: list[EngineOutput]) -> list[int]:
    assert outputs[-1].finish_reason in ("stop", "length"), outputs[-1]
    return [t for o in outputs for t in o.token_ids]


def test_a_stop_token_that_nothing_else_may_come_instead_of_is_the_answers_last_token(engine: Engine, model_folder: Path) -> None:
    """It is said which one it was, whatever other answers of that step do."""
    end = Tokenizer(model_folder).added_token_id("<|action_end|>")
    for number in range(3):
        engine.add(guided(number, grammar=tags("required", parallel=False, end="}<|action_end|>"), stop_token_ids=(2, end)))
    for outputs in run(engine).values():
        assert tokens(outputs)[-1] == end and outputs[-1].stop_token_id == end
        assert outputs[-1].num_generated == len(tokens(outputs))


def alone(engine: Engine, requests: list[EngineRequest]) -> dict[int, list[int]]:
    found = {}
    for request in requests:
        engine.add(request)
        found[request.request_id] = tokens(run(engine)[request.request_id])
    return found


@pytest.mark.parametrize("engine", [{"cache_max_entry_count": 24, "enable_prefix_caching": False}], indirect=True)
def test_preempted_answers_go_on_where_their_grammar_was(engine: Engine) -> None:
    requests = [guided(i, grammar=Grammar("regex", "([a-z]{3} )*"), ignore_eos=True, max_new_tokens=60) for i in range(5)]
    expected = alone(engine, requests)
    for request in requests:
        engine.add(request)
    found = run(engine)
    assert engine.stats().preemptions > 0
    assert {i: tokens(outputs) for i, outputs in found.items()} == expected


@pytest.mark.parametrize("engine", [{"max_prefill_token_num": 16}], indirect=True)
def test_a_prompt_in_chunks_changes_nothing(engine: Engine, model_folder: Path, pipe: Pipeline) -> None:
    engine.add(guided(1, prompt=70))
    engine.add(guided(2, prompt=5, grammar=None))
    found = run(engine)
    text = pipe.tokenizer.decode([t for t in tokens(found[1]) if t != 2])
    jsonschema.validate(json.loads(text), PERSON)


def test_a_failed_step_is_repeated_alone_without_losing_the_grammar(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [guided(i) for i in range(3)]
    expected = alone(engine, requests)
    runner = engine._executor._runner  # type: ignore[attr-defined]
    forward, calls = runner.model.forward, iter(range(1000))

    def sometimes(inputs: Any) -> torch.Tensor:
        if next(calls) in (0, 7, 8, 20):
            raise RuntimeError("a step that fails")
        return forward(inputs)

    monkeypatch.setattr(runner.model, "forward", sometimes)
    for request in requests:
        engine.add(request)
    found = run(engine)
    ended = {i: outputs for i, outputs in found.items() if outputs[-1].finish_reason != "error"}
    assert ended and all(tokens(outputs) == expected[i] for i, outputs in ended.items())


def test_an_aborted_answer_leaves_nothing_behind(engine: Engine) -> None:
    for i in range(4):
        engine.add(guided(i))
    for _ in range(5):
        engine.step()
    engine.abort(1)
    engine.abort(2)
    found = run(engine)
    assert {found[i][-1].finish_reason for i in (1, 2)} == {"abort"} and tokens(found[0]) and tokens(found[3])
    engine.add(guided(5, grammar=None, max_new_tokens=1))
    run(engine)
    assert engine.stats().used_blocks == 0 and not engine._executor._runner.guided.used  # type: ignore[attr-defined]


def test_requests_wait_for_their_compiler_and_not_in_the_way_of_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    compiler = engine._grammars
    assert compiler is not None
    held, compile_now = threading.Event(), compiler._compile

    def slowly(grammar: Grammar) -> Any:
        assert held.wait(60)
        return compile_now(grammar)

    monkeypatch.setattr(compiler, "_compile", slowly)
    engine.add(guided(1, grammar=Grammar("regex", "[a-f]{9}")))
    engine.add(guided(2, grammar=Grammar("regex", "[a-f]{8}")))
    engine.add(guided(3, grammar=Grammar("regex", "(")))
    engine.add(guided(4, grammar=None, max_new_tokens=3, ignore_eos=True))
    found: dict[int, list[EngineOutput]] = {}
    assert engine.stats().waiting == 4
    while 4 not in found or found[4][-1].finish_reason is None:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    assert set(found) == {4} and len(tokens(found[4])) == 3
    engine.abort(2)
    held.set()
    rest = run(engine)
    assert len(tokens(rest[1])) > 0 and rest[2][-1].finish_reason == "abort"
    assert rest[3][-1].error_code == "invalid_grammar"


@pytest.mark.parametrize("engine", [{"cache_max_entry_count": 24, "enable_prefix_caching": False}], indirect=True)
def test_setting_up_a_slot_never_compiles(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """More grammars than are kept for nobody, and sequences that take a slot again: what they need is still there."""
    compiler = engine._grammars
    assert compiler is not None
    compiler.prepare(Grammar("json_object")).result()  # which every engine begins with
    monkeypatch.setattr("lmdeploy.engine.grammar_compiler.MAX_KEPT", 2)
    compile_now, compiled = compiler._compile, []

    def noted(grammar: Grammar) -> Any:
        compiled.append(grammar)
        return compile_now(grammar)

    monkeypatch.setattr(compiler, "_compile", noted)
    requests = [guided(i, grammar=Grammar("regex", "([a-z]{3}%s )*" % ("q" * i)), ignore_eos=True, max_new_tokens=50) for i in range(12)]
    for request in requests:
        engine.add(request)
    found = run(engine)
    assert engine.stats().preemptions > 0
    assert all(len(tokens(outputs)) == 50 for outputs in found.values())
    assert len(compiled) == len(set(compiled)) == 12, "each was compiled once"
    gc.collect()
    assert compiler.num_compiled <= 2 + 1, "those kept, and json_object, which always is"


def test_grammars_are_compiled_ahead_up_to_a_limit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = engine._grammars
    assert compiler is not None
    monkeypatch.setattr("lmdeploy.engine.preparing.MAX_COMPILED", 6)
    monkeypatch.setattr("lmdeploy.engine.grammar_compiler.MAX_KEPT", 2)
    for i in range(15):
        engine.add(guided(i, grammar=Grammar("regex", f"[a-z]{{{i + 1}}}")))
    most, ended = 0, 0
    while engine.has_work:
        ended += sum(output.finish_reason == "stop" for output in engine.step())
        most = max(most, compiler.num_compiled)
    assert ended == 15 and most <= 6


def test_a_mask_that_cannot_be_worked_out_ends_that_answer_only(engine: Engine) -> None:
    """This grammar grows with every token until it exceeds a step's work; the check before a request would refuse it."""
    grows = Grammar("regex", "((((a{0,50}){0,50}){0,50}){0,50}){0,50}")
    engine.add(guided(1, grammar=grows, ignore_eos=True, max_new_tokens=100))
    engine.add(guided(2))
    found = run(engine)
    assert found[1][-1].error_code == "grammar_failed" and "could not be worked out" in str(found[1][-1].error)
    assert tokens(found[2])


def test_choices_that_are_owed_reach_nobody_else_when_running_ahead(engine: Engine) -> None:
    """A step's tokens are chosen when the next step is launched: by then an aborted answer's slot may have somebody else."""
    requests = [guided(i) for i in range(8)]
    late = [guided(10 + i, prompt=30, grammar=None, ignore_eos=True, max_new_tokens=12, temperature=0.0) for i in range(4)] + [guided(20)]
    expected = alone(engine, [*requests, *late])
    engine._run_ahead = 1  # as on CUDA
    for request in requests:
        engine.add(request)
    for _ in range(6):
        engine.step()
    for i in range(4):
        engine.abort(i)
    engine.abort(7)
    for request in late:
        engine.add(request)
    found = run(engine)
    again = {i: tokens(found[i]) for i in (*range(10, 14), 20)}
    assert again == {i: expected[i] for i in again}
    assert all(expected[i][-len(rest) :] == rest for i in (4, 5, 6) if (rest := tokens(found[i])))


def test_an_engine_without_stop_tokens_ends_with_the_grammar(engine: Engine) -> None:
    engine.add(guided(1, stop_token_ids=()))
    engine.add(guided(2, stop_token_ids=(), grammar=Grammar("choice", '["abc"]')))
    assert [outputs[-1].finish_reason for outputs in run(engine).values()] == ["stop", "stop"]


# ------------------------------------------------------------------ which tokens end an answer

EOS, VOCABULARY, SLOTS = 2, 5120, 6


class Given:
    """Masks that are there: what a grammar allows is given."""

    def __init__(self) -> None:
        self.words = torch.zeros((SLOTS, VOCABULARY // 32), dtype=torch.int32)

    def take(self, slot: int, grammar: Grammar, generated: list[int]) -> None: ...

    def leave(self, slot: int) -> None: ...

    def advance(self, slots: Ints, tokens: Ints, last: Flags, seconds: float) -> Flags:
        return np.zeros(slots.size, dtype=bool)

    def there(self, slots: Ints) -> Flags:
        return np.ones(slots.size, dtype=bool)

    def states(self, slots: Ints) -> Ints:
        return np.zeros(slots.size, dtype=np.int64)

    def reason(self, slot: int) -> str:
        return ""

    def wait(self, seconds: float) -> None: ...

    def close(self) -> None: ...

    def allow(self, slot: int, tokens: set[int]) -> None:
        bits = np.zeros(VOCABULARY, dtype=bool)
        bits[list(tokens)] = True
        self.words[slot] = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))

    def allowed(self, slot: int) -> set[int]:
        return set(np.flatnonzero(np.unpackbits(self.words[slot].numpy().view(np.uint8), bitorder="little")).tolist())


def ends_of(allowed: set[int], stops: set[int], *, young: bool) -> tuple[set[int], bool]:
    """What may come next where the grammar allows these tokens, by definition; whether the answer may only end."""
    ends = stops | {EOS}
    others = allowed - ends
    if not allowed & ends:
        return allowed, False
    may = {token for token in ends if (EOS in allowed or token in allowed) and (not young or not others or token not in stops)}
    return others | may, not others


@settings(deadline=None, max_examples=150)
@given(st.randoms(use_true_random=False))
def test_the_tokens_that_end_an_answer_are_its_own_however_many_others_have(draw: Any) -> None:
    masks = Given()
    slots = GuidedSlots(masks, EOS, VOCABULARY, SLOTS)
    stops: list[set[int]] = []
    for slot in range(SLOTS):
        tokens = draw.sample(range(VOCABULARY), draw.choice([0, 1, 2, 8, 9, 60, 1024]))
        tokens += draw.choice([[], [EOS], tokens[:2]])
        params = SamplingParams(max_new_tokens=9, grammar=Grammar("regex", "a"), stop_token_ids=tuple(tokens))
        slots.set(slot, params, [])
        stops.append(set(tokens))
    among = np.array(draw.sample(range(SLOTS), draw.randint(1, SLOTS)))
    for _ in range(2):
        young = np.array([draw.random() < 0.4 for _ in among])
        expected = []
        for slot, is_young in zip(among.tolist(), young.tolist(), strict=True):
            some = set(draw.sample(range(VOCABULARY), draw.choice([0, 3, 400]))) | set(
                draw.sample(sorted(stops[slot]), min(len(stops[slot]), draw.randint(0, 3)))
            )
            allowed = some | set(draw.choice([[], [EOS]]))
            masks.allow(slot, allowed)
            expected.append(ends_of(allowed, stops[slot], young=is_young))
        step = slots.masks(among, young)
        assert step is not None
        step.join()
        assert [(masks.allowed(slot), bool(only)) for slot, only in zip(among.tolist(), step.only_stops, strict=True)] == expected


def test_who_has_many_stop_tokens_costs_the_others_nothing_when_he_is_gone() -> None:
    """A request may have 1,024: a step with him looks at as many of his, and at few of theirs."""
    slots, among, old = GuidedSlots(Given(), EOS, VOCABULARY, SLOTS), np.arange(SLOTS), np.zeros(SLOTS, dtype=bool)
    params = SamplingParams(max_new_tokens=9, grammar=Grammar("regex", "a"), stop_token_ids=(EOS,))
    for slot in range(SLOTS):
        slots.set(slot, params, [])
    slots.set(3, SamplingParams(max_new_tokens=9, grammar=Grammar("regex", "a"), stop_token_ids=tuple(range(1000, 2024))), [])
    step = slots.masks(among, old)
    assert step is not None and step.of.stops.shape == (SLOTS, 1025) and step.of.many.tolist() == [False, False, False, True, False, False]
    slots.set(3, params, [])
    step = slots.masks(among, old)
    assert step is not None and step.of.stops.shape == (SLOTS, 1) and not step.of.many.any()
