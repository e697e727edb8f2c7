"""Chat messages to the text of a prompt, by the Jinja template that comes with a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.text.special_text import StandIns, broken, guard_all
from treadle.runtime.text.template_sandbox import BoundedTemplate

if TYPE_CHECKING:
    from treadle.runtime.text.tokenizer import Tokenizer

_NO_HOLES = re.compile("(?!)")


class ChatTemplate:
    """A model's chat template, run in a sandbox with bounds on time and output: it came with a downloaded file.

    Raises `UnsupportedModelError` if `source` is not a template that this Jinja understands.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._template = BoundedTemplate(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt as text. `kwargs` are further variables of the template, such as `enable_thinking`.

        Raises `InvalidRequestError`, with the template's own words, if it refuses the messages or fails on them, and
        `UnsupportedModelError` if it runs out of bounds.
        """
        return self._template.render(
            {
                "bos_token": self.bos_token,
                "eos_token": self.eos_token,
                "documents": None,
                **kwargs,
                "messages": list(messages),
                "tools": list(tools) if tools else None,
                "add_generation_prompt": add_generation_prompt,
            }
        )


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **kwargs: Any,
) -> list[int]:
    """The prompt as token ids, in which only the template can have written special tokens.

    The ids are those of the rendered text, split at the template's own special tokens and nowhere else: text of a
    message merges with the template's text beside it as it would in plain rendering. So they equal
    `tokenizer.encode(template.render(...), special=True)` unless something in the messages, tools or `kwargs` looks
    like a special token; that is then encoded as the text it is. If the template rewrites such text (cuts it up, or
    decides by it), zero-width spaces are put into it instead.

    Raises `InvalidRequestError` if the model has no chat template, and as `ChatTemplate.render` does.
    """
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt, **kwargs}
    parts = encode_chat_with_holes(tokenizer, messages, _NO_HOLES, **options)
    return [token_id for part in parts if not isinstance(part, str) for token_id in part]


def encode_chat_with_holes(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    holes: re.Pattern[str],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **kwargs: Any,
) -> list[list[int] | str]:
    """As `encode_chat`, for messages in which some text is to come later.

    Returns:
        The ids of the text between matches of `holes`, and the matches where they stand. Text on either side of a
        hole is encoded by itself, so that what comes into the hole can be encoded by itself too.
    """
    template = tokenizer.chat_template
    if template is None:
        raise InvalidRequestError(
            "this model has no chat template. Send a prompt instead of messages, or use an instruction-tuned model."
        )
    special = tokenizer.special_text
    given = {"messages": messages, "tools": tools, **kwargs}

    def render(variables: Mapping[str, Any]) -> str:
        return template.render(**variables, add_generation_prompt=add_generation_prompt)

    stand_ins = StandIns()
    guarded = render(guard_all(given, special, stand_ins.swap))
    if stand_ins.originals and stand_ins.restore(guarded) != render(given):
        stand_ins, guarded = StandIns(), render(guard_all(given, special, broken))
    parts: list[list[int] | str] = [[]]
    for piece in special.split(guarded):
        if isinstance(piece, int):
            _last_ids(parts).append(piece)
            continue
        position = 0
        for match in holes.finditer(piece):
            _last_ids(parts).extend(tokenizer.encode(stand_ins.restore(piece[position : match.start()])))
            parts.append(match[0])
            position = match.end()
        _last_ids(parts).extend(tokenizer.encode(stand_ins.restore(piece[position:])))
    return [part for part in parts if part]


def _last_ids(parts: list[list[int] | str]) -> list[int]:
    """The ids at the end of `parts`, a new list if a hole is there."""
    last = parts[-1]
    if isinstance(last, str):
        last = []
        parts.append(last)
    return last
