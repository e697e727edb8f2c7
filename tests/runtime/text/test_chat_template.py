"""Rendering as transformers does, within bounds."""

import resource
import time

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from treadle.runtime.errors import InvalidRequestError, UnsupportedModelError
from treadle.runtime.text.chat_template import ChatTemplate

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The <b>weather</b> & "more" in Zürich',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}}
CHAT = [
    {"role": "system", "content": " You are\nhelpful. "},
    {"role": "user", "content": "Hi <b> 'there'"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "content": '{"degrees": 3}'},
    {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "parts"}]},
]
TEMPLATES = {
    "namespace and methods": (
        "{%- set ns = namespace(last=-1, seen=[]) -%}\n"
        "{%- for m in messages -%}\n"
        "  {%- if m['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}\n"
        "  {%- set ns.seen = ns.seen + [m.role] -%}\n"
        "{%- endfor -%}\n"
        "{%- for m in messages %}\n"
        "  {%- if m.content is string and '</think>' in m.content -%}\n"
        "    {%- set content = m.content.split('</think>')[-1].lstrip('\\n') -%}\n"
        "  {%- else -%}{%- set content = m.content -%}{%- endif %}\n"
        "<|im_start|>{{ m.role ~ '\\n' }}{{ content }}<|im_end|>\n"
        "{% endfor %}{{ ns.last }} {{ ns.seen | join(', ') | upper }}"
    ),
    "tools as JSON": (
        "{% if tools %}# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{{ tool | tojson(indent=4) }}{% endfor %}"
        "{% endif %}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson if v is not string else v }}{% endfor %}"
        "{% endfor %}{% endfor %}"
    ),
    "macros and blocks": (
        "{% macro show(m, depth=0) %}{% if depth < 2 %}{{ show(m, depth + 1) }}{% endif %}[{{ m.role | title }}]"
        "{% endmacro %}{% for m in messages if m.role != 'tool' %}{{ show(m) }}{% set x %}<{{ m.role }}>{% endset %}"
        "{{ x | trim | length }}{% if loop.last %}end{% else %},{% endif %}{% endfor %}"
    ),
    "loop controls and slices": (
        "{% for m in messages[1:] %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ loop.index }}{{ m.role[:3] }}"
        "{{ '-' * 3 }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}{{ messages[-1].content[0]['text'] }}"
    ),
    "filters and formats": (
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | map(attribute='role') | "
        "unique | sort | join('|') }} {{ '%s-%02d' % ('a', 7) }} {{ '{}:{:>4}'.format('b', 8) }} "
        "{{ 'a b c'.replace(' ', '_') }} {{ 'x\\ny' | indent(2) }} {{ missing | default('none') }} "
        "{{ {'b': 1, 'a': [1, 2.5, none, true]} }} {{ [1, 2] + [3] }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ range(3) | list }}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_renders_as_transformers_does(name, tools):
    variables = {"messages": CHAT, "tools": tools, "documents": None, "add_generation_prompt": True}
    expected = _compile_jinja_template(TEMPLATES[name]).render(**variables, bos_token="<s>", eos_token="</s>")
    assert ChatTemplate(TEMPLATES[name], bos_token="<s>", eos_token="</s>").render(CHAT, tools=tools) == expected


def test_real_template_renders_as_transformers_does(smollm2):
    chat = [{"role": "user", "content": " Hi <b>\n"}, {"role": "assistant", "content": "Ho"}]
    reference = _compile_jinja_template(smollm2.chat_template.source)
    for generate in (True, False):
        expected = reference.render(messages=chat, add_generation_prompt=generate)
        assert smollm2.chat_template.render(chat, add_generation_prompt=generate) == expected


def test_further_variables_reach_the_template():
    template = ChatTemplate("{{ enable_thinking }} {{ bos_token }}{{ eos_token }}", bos_token="<s>", eos_token="</s>")
    assert template.render([], enable_thinking=False) == "False <s></s>"


def test_strftime_now_tells_the_date():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render([]) == time.strftime("%Y")


def test_the_template_s_own_refusal_reaches_the_user():
    template = ChatTemplate("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="Roles must alternate"):
        template.render([])


def test_messages_that_a_template_cannot_take_are_the_user_s_fault():
    template = ChatTemplate("{% for m in messages %}{{ 'a' + m.content }}{% endfor %}")
    with pytest.raises(InvalidRequestError, match="Check that they have the fields"):
        template.render([{"role": "user", "content": None}])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\nb\n{% if %}", "line 3"),
        ("{% nonesuch %}", "nonesuch"),
        ("{{ 1 | nonesuch }}", "nonesuch"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "compiled"),
        ("{% for x in y %}" * 60 + "{% endfor %}" * 60, "compiled"),
        ("x" * 200_001, "200001 characters"),
    ],
)
def test_what_is_not_a_template_is_refused_when_loaded(source, words):
    with pytest.raises(UnsupportedModelError, match=words):
        ChatTemplate(source)


NAMESPACE = "{% set ns = namespace(v='aaaa', l=[1]) %}{% for i in range(99) %}"
HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a kept list": (
        "{% set l = range(99999) | list %}{% for i in l %}{% for j in l %}{% endfor %}{% endfor %}"
    ),
    "conditions of loops": (
        "{% set l = range(99999) | list %}{% for i in l %}{% for j in l if false %}{% endfor %}{% endfor %}"
    ),
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching recursion": (
        "{% macro m(n) %}{% if n %}{% set a = m(n-1) %}{% set a = m(n-1) %}{% endif %}{% endmacro %}{{ m(99) }}"
    ),
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "nested callers": (
        "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call m() %}" * 30 + "x" + "{% endcall %}" * 30
    ),
    "long output": "{% for i in range(99999) %}" + "A" * 1000 + "{% endfor %}",
    "long text in a macro": (
        "{% macro m() %}{% for i in range(99999) %}" + "A" * 9999 + "{% endfor %}{% endmacro %}{{ m() }}"
    ),
    "repeated text": "{{ 'a' * 10**9 }}",
    "repeated text, turned round": "{{ 10**9 * 'a' }}",
    "repeated list": "{{ [1] * 10**9 }}",
    "doubling with ~": NAMESPACE + "{% set ns.v = ns.v ~ ns.v %}{% endfor %}",
    "doubling with +": NAMESPACE + "{% set ns.v = ns.v + ns.v %}{% endfor %}",
    "doubling in a block": NAMESPACE + "{% set x %}{{ ns.v }}{{ ns.v }}{% endset %}{% set ns.v = x %}{% endfor %}",
    "doubling lists": NAMESPACE + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "doubling dicts": NAMESPACE + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l | tojson }}",
    "squares": (
        "{% set ns = namespace(i=2) %}{% for i in range(99) %}{% set ns.i = ns.i * ns.i %}{% endfor %}{{ ns.i }}"
    ),
    "powers": "{{ 9 ** 9 ** 9 }}",
    "kept slices": (
        "{% set s = 'a' * 3000000 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
        "{% set ns.l = ns.l + [s[i:]] %}{% endfor %}"
    ),
    "wide %": "{{ '%1000000000d' % 1 }}",
    "wide % filter": "{{ '%1000000000d' | format(1) }}",
    "computed wide %": "{{ '%*d' % (1000000000, 1) }}",
    "wide format": "{{ '{:1000000000}'.format(1) }}",
    "computed wide format": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "wide date": "{{ strftime_now('%999999999d') }}",
    "wide indent": "{{ ('a\n' * 100000) | indent(1000000) }}",
    "wide JSON": "{{ [1] | tojson(indent=10**9) }}",
    "long replacement": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "long replacement filter": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "long join": "{{ ('a' * 100000).join(range(99999)) }}",
    "long join filter": "{{ range(99999) | join('a' * 100000) }}",
    "list as text": "{{ ['a' * 3000000] * 10000 }}",
    "list as text in a filter": "{{ (['a' * 3000000] * 10000) | upper }}",
    "list as text in a complaint": "{{ [1][['a' * 3000000] * 10000].x }}",
    "far count": "{{ range(10**9) | list }}",
    "namespace in itself": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped(name, monkeypatch):
    monkeypatch.setattr("treadle.runtime.text.template_budget._WORK_PER_CHAR", 6)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(UnsupportedModelError, match="was stopped because it"):
        ChatTemplate(HOSTILE[name]).render([{"role": "user", "content": "hi"}])
    assert time.perf_counter() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_the_clock_stops_what_is_slow_at_every_step(monkeypatch):
    monkeypatch.setattr("treadle.runtime.text.template_budget.MAX_SECONDS", 0.2)
    template = ChatTemplate(
        "{% set s = 'a' * 3000000 %}{% for i in range(9999) %}{% if 'b' in s %}{% endif %}{% endfor %}"
    )
    with pytest.raises(UnsupportedModelError, match=r"more than 0\.2 seconds"):
        template.render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ (1).to_bytes(10**9, 'big') }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'.zfill(10**9) }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ lipsum(n=10**9) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ range.__self__.budget }}",
    ],
)
def test_nothing_beyond_what_templates_need_can_be_reached(source):
    assert reached(source) == ""


def reached(source):
    try:
        return ChatTemplate(source).render([])
    except InvalidRequestError:
        return ""


def test_messages_that_are_too_long_are_the_user_s_fault(smollm2):
    with pytest.raises(InvalidRequestError, match="too long"):
        smollm2.chat_template.render([{"role": "user", "content": "a" * 5_000_000}])


def test_a_long_chat_is_within_bounds(smollm2):
    chat = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(3000)]
    assert len(smollm2.chat_template.render(chat)) > 2_500_000
