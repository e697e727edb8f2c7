"""What is said of constraints that do not compile, and what it costs to say it."""

from __future__ import annotations

import json

import httpx
import pytest

from treadle.grammar import GrammarTimeoutError, JSONSchema, ToolSpec
from treadle.runtime.errors import InvalidRequestError, OverloadedError
from treadle.runtime.server.errors import ApiError
from treadle.runtime.server.turn import TurnRequest
from treadle.runtime.server.turn_constraint import prepared_constraint

GOOD, BAD, SLOW = '{"type": "object"}', '{"type": "thing"}', '{"title": "slow", "type": "object"}'


class Session:
    """Compiles what is not BAD, unless it is SLOW; notes what it was asked for."""

    def __init__(self):
        self.asked = []

    async def prepare(self, constraint, tenant):
        self.asked.append(constraint)
        tools = getattr(constraint, "tools", ())
        answer = constraint if isinstance(constraint, JSONSchema) else constraint.answer
        for schema in [*(tool.parameters for tool in tools), *([answer.schema] if answer is not None else [])]:
            if schema == BAD:
                raise InvalidRequestError("no such type")
            if schema == SLOW:
                raise OverloadedError("it did not compile")
        return ()


async def refused(*tools, answer=None, mode="auto"):
    session = Session()
    specs = tuple(ToolSpec(f"f{index}", "", schema) for index, schema in enumerate(tools))
    wanted = JSONSchema(answer) if answer is not None else None
    request = TurnRequest(messages=[], tools=specs, tool_mode=mode, answer=wanted)
    with pytest.raises(ApiError) as caught:
        await prepared_constraint(session, "us", request)
    return caught.value, len(session.asked)


@pytest.mark.parametrize(
    ("tools", "settings", "param", "num_compiled"),
    [
        ([GOOD, BAD, GOOD, BAD], {}, "tools[1].function.parameters", 3),
        ([BAD] * 100, {}, "tools[0].function.parameters", 2),
        ([BAD], {"answer": BAD}, "tools[0].function.parameters", 2),
        ([GOOD], {"answer": BAD}, "response_format", 3),
        ([], {"answer": BAD}, "response_format", 1),
        ([BAD], {"answer": BAD, "mode": "none"}, "response_format", 1),
    ],
)
async def test_the_first_that_is_at_fault_is_named_and_nothing_is_compiled_after_it(
    tools, settings, param, num_compiled
):
    error, count = await refused(*tools, **settings)
    assert (error.status, error.param, error.code) == (400, param, "invalid_schema")
    assert count == num_compiled


async def test_a_grammar_that_takes_too_long_is_not_called_wrong_and_not_compiled_again():
    error, count = await refused(GOOD, SLOW)
    assert (error.status, error.code, count) == (503, "grammar_timeout", 1)
    assert error.retry_after > 0


def test_a_client_is_told_when_to_ask_again_for_a_grammar_that_takes_too_long(serve):
    class Compiler:
        def compile_soon(self, constraint, done, salt):
            done(GrammarTimeoutError(1))

    with serve() as server, httpx.Client(base_url=server.url, timeout=60) as http:
        kept, server.engine.compiler = server.engine.compiler, Compiler()
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": json.loads(GOOD)}}
        messages = [{"role": "user", "content": "hello"}]
        body = {"model": "treadle", "messages": messages, "response_format": form}
        answer = http.post("/v1/chat/completions", json=body)
        server.engine.compiler = kept
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "grammar_timeout"
