"""Messages as token ids: a prompt is a list of parts, each tokenised alone, and some of them come later.

    messages   system "..." | user "Review: ", draft | assistant <what it wrote before>
    rendered   <|im_start|>system ... Review: [hole] <|im_end|> ... [hole] <|im_end|> ...
    parts      (ids) | Var | (ids) | (recorded ids) | (ids)

What a model wrote goes back into a later prompt as the very ids that it generated, so that the KV of the conversation
is found again. The borders of variables are borders of tokens, whether a value was there before or came piece by piece.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from treadle.dsl.prompt import Message
from treadle.dsl.var import Var
from treadle.runtime.text.chat_template import encode_chat_with_holes
from treadle.runtime.text.tokenizer import Tokenizer

Part: TypeAlias = tuple[int, ...] | Var[Any]

HERMES_INSTRUCTIONS = """# Tools

You may call one or more functions to help with the user's request. Their signatures are between <tools></tools>:
<tools>
{tools}
</tools>

For each call, write a JSON object with the function's name and arguments between <tool_call></tool_call>:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Something that a model wrote, as ids. The token that ended its turn is not among them."""

    token_ids: tuple[int, ...]


Content: TypeAlias = Sequence[str | Var[Any] | Recorded]


@dataclass(frozen=True, slots=True)
class Turn:
    """A message ready to be rendered. `name` tells apart who speak in the same role, where a template knows that."""

    role: str
    content: Content
    name: str | None = None


class Described(Protocol):
    """What prompts need to know of a tool."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def parameters(self) -> dict[str, Any]: ...


class PromptEncoder:
    """Encodes messages for one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        source = tokenizer.chat_template.source if tokenizer.chat_template else ""
        self._knows_tools = "tools" in source
        self._knows_results = "tool" in source

    def turns(self, messages: Sequence[Message], tools: Sequence[Described] = ()) -> list[Turn]:
        """Messages as turns that the model's template understands, tool results and instructions included."""
        return self.fitted([_turn(message) for message in messages], tools)

    def fitted(self, turns: Sequence[Turn], tools: Sequence[Described] = ()) -> list[Turn]:
        """Turns that the model's template understands: it may know neither tools nor their results."""
        turns = [self._result(turn) if turn.role == "tool" else turn for turn in turns]
        if tools and not self._knows_tools:
            listed = "\n".join(json.dumps(function_of(tool), ensure_ascii=False) for tool in tools)
            instructions = HERMES_INSTRUCTIONS.format(tools=listed)
            if turns and turns[0].role == "system":
                turns[0] = Turn("system", [*turns[0].content, "\n\n" + instructions])
            else:
                turns.insert(0, Turn("system", [instructions]))
        return turns

    def encode(self, turns: Sequence[Turn], tools: Sequence[Described] = ()) -> list[Part]:
        """The parts of a prompt that ends where the model begins to write."""
        if self._tokenizer.chat_template is None:
            return self._encode_plain(turns)
        nonce = secrets.token_hex(8)
        holes: list[Var[Any] | Recorded] = []

        def text(item: str | Var[Any] | Recorded) -> str:
            if isinstance(item, str):
                return item
            holes.append(item)
            return f"\ue000{nonce}h{len(holes) - 1}\ue001"

        messages = [
            {"role": turn.role, "content": "".join(map(text, turn.content))}
            | ({"name": turn.name} if turn.name else {})
            for turn in turns
        ]
        pattern = re.compile(f"\ue000{nonce}h(\\d+)\ue001")
        functions = [function_of(tool) for tool in tools] if tools and self._knows_tools else None
        rendered = encode_chat_with_holes(self._tokenizer, messages, pattern, tools=functions)
        return _join([self._part(item, holes, pattern) for item in rendered])

    def _part(self, item: list[int] | str, holes: list[Var[Any] | Recorded], pattern: re.Pattern[str]) -> Part:
        if not isinstance(item, str):
            return tuple(item)
        match = pattern.fullmatch(item)
        assert match is not None
        hole = holes[int(match[1])]
        return hole.token_ids if isinstance(hole, Recorded) else hole

    def _result(self, turn: Turn) -> Turn:
        return turn if self._knows_results else Turn("user", ["<tool_response>\n", *turn.content, "\n</tool_response>"])

    def _encode_plain(self, turns: Sequence[Turn]) -> list[Part]:
        """For a model without a chat template: the texts, one after the other."""
        bos = self._tokenizer.bos_token_id
        parts: list[Part] = [(bos,)] if self._tokenizer.add_bos and bos is not None else []
        for index, turn in enumerate(turns):
            for item in ([] if index == 0 else ["\n\n"]) + list(turn.content):
                if isinstance(item, str):
                    parts.append(tuple(self._tokenizer.encode(item)))
                else:
                    parts.append(item.token_ids if isinstance(item, Recorded) else item)
        return _join(parts)


def _turn(message: Message) -> Turn:
    if message.source is not None and message.source.output.token_ids is not None:
        return Turn(message.role, [Recorded(message.source.output.token_ids)])
    return Turn(message.role, list(message.content))


def function_of(tool: Described) -> dict[str, Any]:
    """A tool as chat templates and models know it."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _join(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring ids as one part."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, tuple) and joined and isinstance(joined[-1], tuple):
            joined[-1] += part
        elif isinstance(part, Var) or part:
            joined.append(part)
    return joined
