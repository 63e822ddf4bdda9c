"""Templates of strangers: the dialect works, bombs end at once, nothing is reached."""

from __future__ import annotations

import threading
import time

import jinja2
import pytest

from lmdeploy.text.jinja_sandbox import BoundedEnvironment, TemplateLimitError

GROW = "{%% set ns = namespace(s=%s) %%}{%% for i in range(80) %%}{%% set ns.s = %s %%}{%% endfor %%}{{ ns.s }}"
BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    GROW % ("'aaaa'", "ns.s + ns.s"),
    GROW % ("'aaaa'", "ns.s ~ ns.s"),
    GROW % ("[1]", "ns.s + ns.s"),
    GROW % ("[1]", "[ns.s, ns.s]"),
    GROW % ("3", "ns.s * ns.s"),
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'|center(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format('x') }}",
    "{{ '{:{}}'.format('x', 10**9) }}",
    "{{ ('a' * 10**7).replace('a', 'b' * 10**7) }}",
    "{{ ('a' * 10**7)|replace('a', 'b' * 10**7) }}",
    "{{ range(99999)|map('string')|join('a' * 10**6) }}",
    "{% set x %}{% for i in range(99999) %}{% for j in range(20) %}" + "A" * 100_000 + "{% endfor %}{% endfor %}{% endset %}{{ x|length }}",
    "{{ range(10**12)|list }}",
]


def render(source: str, **variables: object) -> str:
    environment = BoundedEnvironment()
    return environment.render_bounded(environment.from_string(source), dict(variables))


@pytest.mark.parametrize("source", BOMBS, ids=lambda s: s[:50])
def test_bombs_end_quickly_with_an_error(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises((TemplateLimitError, OverflowError, jinja2.TemplateError)):
        render(source)
    assert time.perf_counter() - start < 12


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "{{ m.append(1) }}",
        "{{ m.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}{{ m.clear() }}",
    ],
)
def test_nothing_outside_is_reached_or_changed(source: str) -> None:
    m = [1]
    with pytest.raises((jinja2.TemplateError, TypeError)):
        render(source, m=m)
    assert m == [1]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'b': '<&\"é', 'a': [1, none]} | tojson }}", '{"b": "<&\\"é", "a": [1, null]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for x in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}", "1/3,2/3,3/3"),
        ("{% for x in m|selectattr('a') %}{{ x.a }}{{ loop.last }}{% endfor %}", "1False2True"),
        ("{{ m | map(attribute='a') | join('-') }} {{ 'a-b'.split('-')[-1] ~ 1 }} {{ 'x' in 'xyz' }} {{ 'ab'|replace('a', 'c') }}", "1-2 b1 True cb"),
        ("{% macro f(context, obj=2) %}{{ context }}{{ obj }}{% endmacro %}{{ f(context=1, obj=3) }}", "13"),
        ("{% set ns = namespace(n=0) %}{% for x in m %}{% set ns.n = ns.n + x.a %}{% endfor %}{{ ns.n }} {{ 'a\nb'|indent(2) }}", "3 a\n  b"),
        ("{{ (m + m)|length }} {{ m == m }} {{ [m[0], m[1]] == m }} {{ (1, 2)|string }} {{ m[0].items()|list }}", "4 True True (1, 2) [('a', 1)]"),
        ("{{ strftime_now('%Y')|length }}", "4"),
        ("L" * 600 + "{{ 1 }}", "L" * 600 + "1"),
    ],
)
def test_the_dialect_of_chat_templates_works(source: str, text: str) -> None:
    assert render(source, m=[{"a": 1}, {"a": 2}]) == text


def test_ten_thousand_messages_are_rendered_in_a_moment() -> None:
    source = "{% for m in messages %}{% if 'tool_calls' in m and m.tool_calls == [] %}{% endif %}{{ '<' ~ m.role + '>' + m.content | trim + '\n' }}{% endfor %}"
    start = time.perf_counter()
    text = render(source, messages=[{"role": "user", "content": "x" * 1600}] * 10_000)
    assert len(text) == 10_000 * 1607 and time.perf_counter() - start < 5


def test_renderings_in_several_threads_have_budgets_of_their_own() -> None:
    environment = BoundedEnvironment()
    template = environment.from_string("{% for i in range(90000) %}{{ loop.index % 7 }}{% endfor %}")
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(len(environment.render_bounded(template, {})))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [90000] * 3
