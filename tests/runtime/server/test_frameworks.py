"""The tool loops of agent frameworks, which know nothing of this server but its address.

A small model does not choose tools wisely, so the first turn must call one; what is tested is that the loop turns: the
tool runs with arguments that its schema allows, its result goes back, and the run ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
from pydantic import BaseModel

# The frameworks keep their connections for the next run, so all of these share one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "smollm2"
City = Literal["Paris", "Rome"]
QUESTION = "What is the weather in Paris?"
REPORT = "sunny, 21 degrees"


class Weather(BaseModel):
    city: City
    sky: Literal["sunny", "cloudy"]


@pytest.fixture(autouse=True)
def base_url(smollm2_url, monkeypatch):
    """All that a framework is told."""
    monkeypatch.setenv("OPENAI_BASE_URL", f"{smollm2_url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")


@pytest.fixture
def cities() -> list[str]:
    """The arguments with which the tool was called."""
    return []


@pytest.fixture
def get_weather(cities) -> Callable[[City], str]:
    def get_weather(city: City) -> str:
        """The weather in a city."""
        cities.append(city)
        return REPORT

    return get_weather


def openai_agent(tool):
    """An agent of the OpenAI Agents SDK that calls the tool first, and then answers.

    Its answer has a type, because that is sure to end: the SDK fails at one that reaches its limit.
    """
    from agents import Agent, AgentHooks, ModelSettings, function_tool, set_tracing_disabled

    class OneRound(AgentHooks):
        async def on_tool_end(self, context, agent, tool, result):
            agent.model_settings = replace(agent.model_settings, tool_choice="none")

    set_tracing_disabled(True)
    settings = ModelSettings(temperature=0, max_tokens=48, tool_choice="required", parallel_tool_calls=False)
    tools = [function_tool(tool)]
    return Agent(
        name="reporter",
        instructions="Be brief.",
        model=MODEL,
        model_settings=settings,
        tools=tools,
        reset_tool_choice=False,
        hooks=OneRound(),
        output_type=Weather,
    )


@pytest.mark.parametrize("api", ["responses", "chat_completions"])
async def test_openai_agents_sdk(get_weather, cities, api):
    from agents import OpenAIProvider, RunConfig, Runner

    config = RunConfig(model_provider=OpenAIProvider(use_responses=api == "responses"))
    result = await Runner.run(openai_agent(get_weather), QUESTION, run_config=config, max_turns=4)
    kinds = [item.type for item in result.new_items]
    assert kinds[:2] == ["tool_call_item", "tool_call_output_item"] and kinds[-1] == "message_output_item"
    assert len(cities) == 1 and cities[0] in ("Paris", "Rome")
    assert result.new_items[1].output == REPORT and isinstance(result.final_output, Weather)


async def test_openai_agents_sdk_streams(get_weather, cities):
    from agents import OpenAIProvider, RunConfig, Runner

    config = RunConfig(model_provider=OpenAIProvider())
    result = Runner.run_streamed(openai_agent(get_weather), QUESTION, run_config=config, max_turns=4)
    raw = [event.data.type async for event in result.stream_events() if event.type == "raw_response_event"]
    assert len(cities) == 1 and raw.count("response.created") == raw.count("response.completed") == 2
    assert "response.function_call_arguments.done" in raw and "response.output_text.delta" in raw
    assert isinstance(result.final_output, Weather)


async def test_openai_agents_sdk_with_what_the_server_remembers(get_weather, cities):
    from agents import OpenAIProvider, RunConfig, Runner

    config = RunConfig(model_provider=OpenAIProvider())
    asked = {"run_config": config, "max_turns": 4}
    first = await Runner.run(openai_agent(get_weather), QUESTION, auto_previous_response_id=True, **asked)
    second = await Runner.run(
        openai_agent(get_weather), "And in Rome?", previous_response_id=first.last_response_id, **asked
    )
    assert len(cities) == 2
    assert second.raw_responses[0].usage.input_tokens > first.raw_responses[-1].usage.input_tokens
    assert second.raw_responses[0].usage.input_tokens_details.cached_tokens > 0


async def test_langgraph_with_a_tool_node(get_weather, cities):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI
    from langgraph.graph import START, MessagesState, StateGraph
    from langgraph.prebuilt import ToolNode, tools_condition

    model = ChatOpenAI(model=MODEL, temperature=0, max_completion_tokens=48)

    async def talk(state: MessagesState):
        has_result = isinstance(state["messages"][-1], ToolMessage)
        bound = model.bind_tools(
            [get_weather], tool_choice="none" if has_result else "required", parallel_tool_calls=False
        )
        return {"messages": [await bound.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("talk", talk)
    graph.add_node("tools", ToolNode([get_weather]))
    graph.add_edge(START, "talk")
    graph.add_conditional_edges("talk", tools_condition)
    graph.add_edge("tools", "talk")
    messages = (await graph.compile().ainvoke({"messages": [HumanMessage(QUESTION)]}))["messages"]
    assert [message.type for message in messages][:2] == ["human", "ai"] and messages[-1].type == "ai"
    assert cities and messages[2].content == REPORT
    assert messages[2].tool_call_id == messages[1].tool_calls[0]["id"]
    assert messages[-1].usage_metadata["input_token_details"]["cache_read"] > 0


@pytest.mark.parametrize("use_responses_api", [False, True])
async def test_langchain_agent_that_streams_and_ends_with_a_type(get_weather, cities, use_responses_api):
    from langchain.agents import create_agent
    from langchain.agents.middleware import wrap_model_call
    from langchain.agents.structured_output import ProviderStrategy
    from langchain_openai import ChatOpenAI

    @wrap_model_call
    async def call_once(request, handler):
        choice = "none" if cities else "required"
        return await handler(request.override(model_settings={"tool_choice": choice, "parallel_tool_calls": False}))

    model = ChatOpenAI(model=MODEL, temperature=0, max_completion_tokens=96, use_responses_api=use_responses_api)
    agent = create_agent(model, [get_weather], middleware=[call_once], response_format=ProviderStrategy(Weather))
    pieces, final = [], None
    limits = {"recursion_limit": 8}
    asked = {"messages": [("user", QUESTION)]}
    async for mode, chunk in agent.astream(asked, limits, stream_mode=["messages", "values"]):
        if mode == "messages":
            pieces.append(chunk)
        else:
            final = chunk
    assert len(cities) >= 1 and len(pieces) > 3
    assert isinstance(final["structured_response"], Weather)


@pytest.mark.parametrize("model", ["openai:smollm2", "openai-chat:smollm2"])
@pytest.mark.parametrize("form", ["tool", "native"])
async def test_pydantic_ai(get_weather, cities, model, form):
    from pydantic_ai import Agent, NativeOutput, ToolOutput
    from pydantic_ai.messages import ToolReturnPart

    async def only_once(context, definition):
        return None if cities else definition

    def choice(context):
        tools = "auto" if cities else ["get_weather"]
        return {"temperature": 0, "max_tokens": 96, "tool_choice": tools, "parallel_tool_calls": False}

    output = ToolOutput(Weather, name="report") if form == "tool" else NativeOutput(Weather)
    agent = Agent(model, output_type=output, model_settings=choice)
    agent.tool_plain(get_weather, prepare=only_once)
    result = await agent.run(QUESTION)
    returned = [part for message in result.all_messages() for part in message.parts if isinstance(part, ToolReturnPart)]
    assert cities and isinstance(result.output, Weather)
    assert returned[0].content == REPORT
    assert result.usage.requests >= 2 and result.usage.output_tokens > 0


async def test_pydantic_ai_streams(get_weather, cities):
    from pydantic_ai import Agent

    def choice(context):
        tools = "none" if cities else "required"
        return {"temperature": 0, "max_tokens": 32, "tool_choice": tools, "parallel_tool_calls": False}

    agent = Agent("openai:smollm2", model_settings=choice, tools=[get_weather])
    async with agent.run_stream(QUESTION) as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
    assert cities and "".join(pieces)


async def test_several_agents_run_at_once(get_weather, cities):
    from agents import OpenAIProvider, RunConfig, Runner

    config = RunConfig(model_provider=OpenAIProvider())
    runs = [
        Runner.run(openai_agent(get_weather), f"{QUESTION} I am number {i}.", run_config=config, max_turns=4)
        for i in range(4)
    ]
    results = await asyncio.gather(*runs)
    assert len(cities) == 4 and all(isinstance(result.final_output, Weather) for result in results)
