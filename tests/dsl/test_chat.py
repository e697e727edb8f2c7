"""Conversations: turns that extend one another, tools that run beside them."""

import asyncio
from typing import Annotated

import pytest
from pydantic import Field
from support.fake_backend import Reply, eventually
from support.flows import Review, double, fail, write

from treadle.dsl import Chat, program, tool
from treadle.dsl.errors import DSLError, NodeCancelled, OutputError, StepLimitError
from treadle.dsl.node import ToolNode


def script(*replies):
    """A model that gives one reply after another."""
    rest = iter(replies)
    return lambda text: next(rest)


def calls(*pairs, text="", seconds=0.0):
    return Reply(text, tuple(pairs), seconds)


async def test_ask_runs_all_tools_of_a_turn_and_returns_the_answer(backend):
    backend.model = script(
        calls(("double", '{"number": 2}'), ("double", '{"number": 5}'), text="Let me see."), '{"score": 4}'
    )
    async with program("agent") as p:
        chat = Chat("Use tools.", tools=[double], returns=Review, max_tokens=9)
        assert await chat.ask("go") == Review(score=4)
        assert backend.prompts[-1] == "system: Use tools.\nuser: go\nassistant: Let me see.\ntool: 4\ntool: 10"
        first, *tools, second = p.graph.nodes()
        assert [(node.kind, node.name) for node in tools] == [("tool", "double")] * 2
        assert all(node.caller is first and node.inputs == () for node in tools)
        assert second.extends is first and second.inputs == (first, *tools)
        kinds = {(a, b): data["kind"] for a, b, data in p.graph.dag.edges(data=True)}
        assert kinds[first.id, tools[0].id] == "calls" and kinds[first.id, second.id] == "extends"
        assert first.options.max_tokens == 9 and first.options.tools == (double,)
        assert first.output_schema["required"] == ["score"]
        assert chat.messages[2].source is first and chat.messages[3].tool_call_id == f"{first.id}.0"


async def test_the_loop_by_hand_runs_no_tool_before_it_is_told_to(backend):
    backend.model = script(calls(("double", '{"number": 2}')), "four")
    async with program("agent") as p:
        chat = Chat(tools=[double])
        turn = await chat.send("go")
        assert [(call.name, call.arguments) for call in turn.calls] == [("double", '{"number": 2}')]
        assert "tool" not in [node.kind for node in p.graph.nodes()]
        with pytest.raises(DSLError, match="run_tools"):
            _ = turn.answer
        with pytest.raises(DSLError, match="run_tools"):
            await chat.send("more")
        turn = await chat.run_tools(turn)
        assert (turn.text, turn.calls, turn.answer) == ("four", (), "four")
        with pytest.raises(DSLError, match="last turn"):
            await chat.run_tools(turn)


async def test_variables_in_a_message_are_edges(backend):
    async with program("agent"):
        chat, draft = Chat(), write("x")
        turn = await chat.send("review ", draft)
        assert turn.text == "review write x plain" and turn.node.inputs == (draft.node,)
        again = await chat.send("more")
        assert again.node.inputs == (turn.node,) and again.node.extends is turn.node
        assert backend.prompts[-1].endswith("assistant: review write x plain\nuser: more")


async def test_a_tool_starts_while_the_turn_is_still_written(backend):
    ran = asyncio.Event()

    @tool(effects="idempotent")
    async def early() -> str:
        ran.set()
        return "ran"

    backend.model = script(calls(("early", "{}"), seconds=60))
    async with program("agent") as p:
        asking = asyncio.ensure_future(Chat(tools=[early]).ask("go"))
        await asyncio.wait_for(ran.wait(), 5)
        assert p.graph.nodes()[0].state == "running"
        asking.cancel()


async def test_a_tool_that_may_run_once_waits_for_the_turn_to_be_complete(backend):
    order = []

    @tool
    async def pay(amount: int) -> str:
        order.append("paid")
        return "paid"

    def model(text):
        async def written():
            return Reply("", (("pay", '{"amount": 1}'),), 0.02)

        return written() if "tool:" not in text else "done"

    backend.model = model
    async with program("agent") as p:
        asking = asyncio.ensure_future(Chat(tools=[pay]).ask("go"))
        await eventually(lambda: bool(p.graph.nodes()) and p.graph.nodes()[0].calls)
        p.graph.nodes()[0].output.on_done(lambda var: order.append("turn"))
        assert await asking == "done"
    assert order == ["turn", "paid"]


async def test_a_turn_that_fails_cancels_its_tools_and_leaves_the_conversation_as_it_was(backend):
    @tool(effects="read")
    async def endless() -> str:
        await asyncio.sleep(60)

    backend.model = script("no review", '{"score": 1}')
    chat = Chat(tools=[endless], returns=Review)
    async with program("agent"):
        with pytest.raises(OutputError, match="does not fit Review"):
            await chat.ask("go")
        assert chat.messages == ()
        assert await chat.ask("again") == Review(score=1)

    backend.model = script(calls(("endless", "{}"), seconds=60))
    async with program("agent") as p:
        asking = asyncio.ensure_future(Chat(tools=[endless]).ask("go"))
        await eventually(lambda: len(p.graph.nodes()) == 2)
        turn, running = p.graph.nodes()
        turn.output.cancel()
        with pytest.raises(NodeCancelled):
            await asking
        assert running.state == "cancelled"


@pytest.mark.parametrize(
    ("call", "message", "error"),
    [
        (("fail", '{"text": "x"}'), "Error: fail failed: RuntimeError: no luck with x", "ToolError"),
        (
            ("double", '{"number": "z"}'),
            "Error: wrong arguments for double: number: Input",
            "ToolArgumentsError",
        ),
        (("double", '{"num'), "Error: wrong arguments for double: Invalid JSON", "ToolArgumentsError"),
        (("triple", "{}"), "Error: there is no tool 'triple'; the tools are: double, fail", "ToolArgumentsError"),
    ],
)
async def test_a_call_that_fails_tells_the_model_and_is_seen_in_the_graph(backend, call, message, error):
    backend.model = script(calls(call), "sorry")
    async with program("agent") as p:
        assert await Chat(tools=[double, fail]).ask("go") == "sorry"
        assert f"tool: {message}" in backend.prompts[-1]
        (node,) = (node for node in p.graph.nodes() if isinstance(node, ToolNode))
        assert node.state == "failed" and type(node.error).__name__ == error
        assert node in backend.started
        assert node.output.error is None


async def test_arguments_that_break_what_no_grammar_enforces_are_told_to_the_model(backend):
    ran = []

    @tool(effects="read")
    def total(numbers: Annotated[list[int], Field(json_schema_extra={"uniqueItems": True})]) -> int:
        ran.append(numbers)
        return sum(numbers)

    backend.model = script(calls(("total", '{"numbers": [1, 1]}')), calls(("total", '{"numbers": [1, 2]}')), "three")
    async with program("agent"):
        assert await Chat(tools=[total]).ask("go") == "three"
        assert "Error: wrong arguments for total: 'uniqueItems' at /numbers does not hold" in backend.prompts[-1]
    assert ran == [[1, 2]]


async def test_a_backend_may_tell_a_call_again_without_effect(backend):
    backend.model = script(calls(("double", '{"number": 2}'), ("double", '{"number": 2}')), "four")
    async with program("agent") as p:
        turn_node = None

        async def ask():
            return await Chat(tools=[double]).ask("go")

        asking = asyncio.ensure_future(ask())
        await eventually(lambda: len(p.graph.nodes()) >= 3)
        turn_node = p.graph.nodes()[0]
        assert turn_node.on_tool_call(0, "double", '{"number": 2}') is turn_node.calls[0].result
        assert await asking == "four"
        assert len([node for node in p.graph.nodes() if node.kind == "tool"]) == 2


async def test_a_loop_without_an_answer_stops_at_its_limit(backend):
    ran = []

    @tool(effects="read")
    def note(text: str) -> str:
        ran.append(text)
        return "ok"

    backend.model = script(*(calls(("note", f'{{"text": "{index}"}}')) for index in range(3)), "answer")
    async with program("agent"):
        chat = Chat(tools=[note])
        with pytest.raises(StepLimitError, match="no answer in 3 turns; the last one calls note"):
            await chat.ask("go", max_steps=3)
        assert ran == ["0", "1"]
        with pytest.raises(DSLError, match="at least 1"):
            await chat.ask("go", max_steps=0)


async def test_one_turn_at_a_time(backend):
    async def hang(text):
        await asyncio.sleep(60)

    backend.model = hang
    async with program("agent"):
        chat = Chat()
        first = asyncio.ensure_future(chat.send("a"))
        await eventually(lambda: backend.prompts)
        with pytest.raises(DSLError, match="still running"):
            await chat.send("b")
        first.cancel()


async def test_a_conversation_outside_of_a_scope_and_across_programs(backend):
    backend.model = script(calls(("double", '{"number": 2}')), "four", "again", "later")
    chat = Chat(tools=[double])
    assert await chat.ask("go") == "four"
    await eventually(lambda: backend.events[-1:] == ["close chat"])
    assert await chat.ask("more") == "again"
    async with program("p"):
        assert await chat.ask("and more") == "later"
    assert backend.prompts[-1].splitlines() == [
        "user: go", "assistant: ", "tool: 4", "assistant: four", "user: more", "assistant: again", "user: and more"
    ]  # fmt: skip


async def test_a_tool_may_run_a_conversation_of_its_own(backend):
    @tool(effects="read")
    async def delegate(task: str) -> str:
        return await Chat("sub").ask(task)

    def model(text):
        if text.startswith("system: sub"):
            return "sub answer"
        return "done" if "tool: sub answer" in text else calls(("delegate", '{"task": "t"}'))

    backend.model = model
    async with program("agent") as p:
        assert await Chat("main", tools=[delegate]).ask("go") == "done"
        assert [node.name for node in p.graph.nodes()] == ["chat", "delegate", "chat", "chat"]


def test_tools_of_the_same_name_are_refused():
    with pytest.raises(DSLError, match="same name"):
        Chat(tools=[double, double])
