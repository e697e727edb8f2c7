"""Chat messages to the text of a prompt, by the Jinja template that comes with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treadle.runtime.text.template_sandbox import BoundedTemplate


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

        Raises `InvalidRequestError` with the template's own words if it refuses the messages, and
        `UnsupportedModelError` if it fails or runs out of bounds.
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
