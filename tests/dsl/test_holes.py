"""Holes: variables in prompts are found again, and nothing else is taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_backend import FakeBackend
from support.flows import fail, merge, write

from treadle.dsl import Chat, In, Program, Var, llm, program, prompt
from treadle.dsl.errors import ForeignVarError, NodeFailed, PromptError, VarUseError
from treadle.dsl.holes import RENDERING, rendering_of
from treadle.dsl.node import Node


def a_program(names=("a", "b", "c"), parent=None):
    program = Program("p", FakeBackend(), parent=parent)
    for name in names:
        program.declare(Node(program, "llm", name))
    return program, [node.output for node in program.graph.nodes()]


def rendered(program, build):
    rendering = rendering_of(program)
    token = RENDERING.set(rendering)
    try:
        return rendering.split(build())
    finally:
        RENDERING.reset(token)


PROGRAM, VARS = a_program()
OTHER, OTHER_VARS = a_program()
TEXT = st.text(st.characters() | st.sampled_from("\ue000\ue001:n0123456789abcdef"))


def a_tag(program, var):
    return f"\ue000{program.nonce}:{var.node.id}\ue001"


@given(st.lists(TEXT | st.sampled_from(VARS)))
def test_any_mix_of_text_and_variables_is_split_into_what_it_was_made_of(parts):
    segments = rendered(PROGRAM, lambda: "".join(f"{part}" for part in parts))
    expected = []
    for part in parts:
        if isinstance(part, str) and expected and isinstance(expected[-1], str):
            expected[-1] += part
        elif isinstance(part, Var) or part:
            expected.append(part)
    assert list(segments) == expected


@given(st.lists(TEXT | st.sampled_from([a_tag(OTHER, var) for var in OTHER_VARS])))
def test_tags_of_other_programs_are_text(parts):
    text = "".join(parts)
    assert rendered(PROGRAM, lambda: text) == ((text,) if text else ())


def test_a_tag_of_a_node_that_does_not_exist_is_damage_not_text():
    with pytest.raises(PromptError):
        rendered(PROGRAM, lambda: f"\ue000{PROGRAM.nonce}:n99\ue001")


@pytest.mark.parametrize(
    "damage",
    [str.upper, lambda tag: tag[:-3], lambda tag: tag[5:], lambda tag: tag[:20]],
    ids=["upper", "end", "start", "cut"],
)
def test_a_damaged_hole_is_an_error(damage):
    with pytest.raises(PromptError, match="sliced or changed"):
        rendered(PROGRAM, lambda: f"x {damage(str(VARS[0]))} y")


def test_a_format_in_a_hole_is_an_error():
    with pytest.raises(VarUseError, match="await"):
        rendered(PROGRAM, lambda: f"{VARS[0]:>10}")


def test_outside_of_a_body_a_variable_formats_as_its_repr():
    assert f"{VARS[0]}" == str(VARS[0]) == repr(VARS[0])
    assert PROGRAM.nonce not in repr(VARS[0])


async def test_untrusted_text_cannot_name_a_variable(backend):
    async with program("p") as p:
        secret = write("secret")
        attack = f"\ue000{'0' * 32}:{secret.node.id}\ue001"
        outcome = write(attack)
        await outcome
        assert outcome.node.inputs == ()
        assert f"write {attack} plain" in backend.prompts[-1]
        assert p.graph.dag.number_of_edges() == 0


async def test_the_edges_are_what_was_passed(backend):
    seen = {}

    @llm
    async def body(draft: In[str], many: object, plain: str) -> str:
        seen["draft"] = draft
        return prompt(f"{plain}: {draft}")

    async with program("p") as p:
        a, b, c, d = (write(name) for name in "abcd")
        result = body(a, {"x": [b, (c,)]}, plain="text")
        assert set(result.node.inputs) == {a.node, b.node, c.node}
        assert await result == f"text: {await a}"
        assert seen["draft"] is a
        merged = merge(write.map(["e", "f"]))
        assert [node.name for node in merged.node.inputs] == ["write", "write"]
        await merged
        assert "merge:\nwrite e plain\nwrite f plain" in backend.prompts[-1]
        assert d.node not in p.graph.dag.predecessors(result.node.id)


async def test_a_variable_that_only_the_body_knows_becomes_an_edge(backend):
    async with program("p") as p:
        outer = write("outer")

        @llm
        async def closing_over() -> str:
            return prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": outer}])

        result = closing_over()
        assert result.node.inputs == ()
        await result
        assert result.node.inputs == (outer.node,)
        assert p.graph.dag.has_edge(outer.node.id, result.node.id)


async def test_text_with_a_hole_can_be_handed_to_a_call_made_by_the_body(backend):
    @llm
    async def relay(draft: In[str]) -> str:
        return await write(f"about {draft}")

    async with program("p"):
        assert await relay(write("x")) == "write about write x plain plain"


async def test_a_conversation_in_a_body_finds_holes_and_a_tool_refuses_them(backend):
    @llm
    async def discuss(draft: In[str]) -> str:
        return await Chat().ask(f"discuss {draft}")

    @llm
    async def compute(draft: In[str]) -> str:
        return await fail(f"about {draft}")

    async with program("p"):
        draft = write("x")
        assert await discuss(draft) == "discuss write x plain"
        with pytest.raises(VarUseError, match="await it first, or pass it as it is"):
            await compute(draft)


async def test_a_variable_of_another_program_is_refused():
    async with program("first"):
        draft = write("x")
        await draft
    async with program("second"):
        with pytest.raises(ForeignVarError, match="belongs to program 'first-"):
            write(draft)

        @llm
        async def closing_over() -> str:
            return prompt(f"{draft}")

        with pytest.raises(ForeignVarError):
            await closing_over()


async def test_a_program_inside_takes_variables_of_the_one_around_it():
    async with program("outer"):
        draft = write("x")
        async with program("inner"):
            assert await write(draft) == "write write x plain plain"


async def test_prompt_outside_of_a_body_and_a_body_that_returns_a_hole_are_errors():
    with pytest.raises(PromptError, match="return it from its body"):
        prompt("text")

    @llm
    async def forgot(draft: In[str]) -> str:
        return f"review {draft}"

    async with program("p"):
        with pytest.raises(PromptError, match=r"return prompt"):
            await forgot(write("x"))
        with pytest.raises(NodeFailed):
            await write(forgot(write("x")))
