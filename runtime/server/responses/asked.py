"""What a request asks for: the turn that it means, and the fields that the response repeats."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from treadle.grammar import JSONSchema, ToolSpec
from treadle.runtime.server.context import Server
from treadle.runtime.server.errors import ApiError, invalid
from treadle.runtime.server.requests import (
    ANY_OBJECT,
    check_known,
    checked_max_tokens,
    json_answer,
    sampling_params,
    tool_spec,
)
from treadle.runtime.server.responses.requests import (
    LOGPROBS,
    AnyObjectFormat,
    FunctionChoice,
    FunctionSubset,
    ResponseRequest,
    TextOptions,
    TextSchemaFormat,
)
from treadle.runtime.server.turn import TurnRequest

_NAMES = {"messages": "input", "response_format": "text.format.schema"}


def turn_of(server: Server, request: ResponseRequest, messages: Sequence[Mapping[str, Any]]) -> TurnRequest:
    """The turn that is asked for, after these messages. Raises `ApiError` for what does not fit together."""
    tokenizer, _ = server.text_model()
    mode, callable_tools = _choice(request)
    logprobs = (request.top_logprobs or 0) if wants_logprobs(request) else None
    return TurnRequest(
        messages=messages,
        tools=_tools(request),
        callable_tools=callable_tools,
        tool_mode=mode,
        parallel=request.parallel_tool_calls is not False,
        strict_tools=frozenset(tool.name for tool in request.tools or () if tool.strict),
        answer=_answer(request.text or TextOptions()),
        sampling=sampling_params(
            request,
            vocab_size=server.engine.vocab_size,
            stop_token_ids=tokenizer.eos_token_ids,
            logprobs=logprobs,
        ),
        max_tokens=checked_max_tokens(request.max_output_tokens, server, "max_output_tokens"),
        name="response",
    )


@contextlib.contextmanager
def fields_renamed() -> Iterator[None]:
    """Errors of the scope name fields as requests of this endpoint have them, where turns name those of chat."""
    try:
        yield
    except ApiError as error:
        if error.param is not None:
            name = _NAMES.get(error.param) or re.sub(r"^(tools\[\d+\])\.function\b", r"\1", error.param)
            error.message = error.message.replace(f"{error.param}: ", f"{name}: ", 1)
            error.param = name
        raise


def wants_logprobs(request: ResponseRequest) -> bool:
    """Whether the message is to come with logprobs."""
    return LOGPROBS in (request.include or ()) or bool(request.top_logprobs)


def repeated(request: ResponseRequest) -> dict[str, Any]:
    """The fields of a response object that say what was asked for, with the defaults for what was not."""
    tools = [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
            "strict": bool(tool.strict),
        }
        for tool in request.tools or []
    ]
    choice = request.tool_choice or "auto"
    form = (request.text or TextOptions()).format
    return {
        "model": request.model,
        "instructions": request.instructions,
        "previous_response_id": request.previous_response_id,
        "store": request.store is not False,
        "tools": tools,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "max_tool_calls": request.max_tool_calls,
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_logprobs": request.top_logprobs or 0,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "prompt_cache_key": request.prompt_cache_key,
        "safety_identifier": request.safety_identifier,
        "user": request.user,
        "service_tier": "default",
        "truncation": "disabled",
        "reasoning": {"effort": None, "summary": None},
    }


def _tools(request: ResponseRequest) -> tuple[ToolSpec, ...]:
    specs: dict[str, ToolSpec] = {}
    for index, tool in enumerate(request.tools or ()):
        param = f"tools[{index}]"
        if tool.name in specs:
            raise invalid(f"{param}.name: there is another tool {tool.name!r}", f"{param}.name")
        specs[tool.name] = tool_spec(tool.name, tool.description, tool.parameters, param)
    return tuple(specs.values())


def _choice(request: ResponseRequest) -> tuple[Literal["auto", "none", "required"], tuple[str, ...] | None]:
    """Whether tools may, must or must not be called, and which ones if not all."""
    names = [tool.name for tool in request.tools or []]
    match request.tool_choice:
        case None:
            return "auto", None
        case FunctionChoice(name=name):
            check_known([name], names, "tool_choice.name")
            return "required", (name,)
        case FunctionSubset(mode=mode, tools=allowed):
            for index, tool in enumerate(allowed):
                check_known([tool.name], names, f"tool_choice.tools[{index}].name")
            return mode, tuple(tool.name for tool in allowed)
        case mode:
            if mode == "required" and not names:
                raise invalid("tool_choice: required, but there are no tools", "tool_choice")
            return mode, None


def _answer(text: TextOptions) -> JSONSchema | None:
    match text.format:
        case AnyObjectFormat():
            return ANY_OBJECT
        case TextSchemaFormat(schema_=schema, strict=strict):
            return json_answer(schema, strict=bool(strict))
    return None
