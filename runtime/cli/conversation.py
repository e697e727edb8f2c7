"""A conversation that fits its context: the oldest turns go when the next answer needs the room."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import AsyncGenerator

from treadle.runtime.cli.options import sampling_params
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.local import Chunk, LocalRuntime

_ANSWER_SHARE = 4


class Conversation:
    """Messages so far, and how to get the next answer."""

    def __init__(self, runtime: LocalRuntime, args: argparse.Namespace) -> None:
        if runtime.tokenizer is None:
            raise InvalidRequestError(
                f"{runtime.name} has no tokenizer, so it cannot chat; try `treadle generate --ids`"
            )
        self._runtime = runtime
        self._args = args
        self._system = [{"role": "system", "content": args.system}] if args.system is not None else []
        self._max_tokens: int = args.default_max_tokens if args.max_tokens is None else args.max_tokens
        self._turns: list[dict[str, str]] = []
        self.num_dropped = 0

    def reset(self) -> None:
        """Forgets every turn; the system message stays."""
        self._turns.clear()

    async def answer(self, message: str) -> AsyncGenerator[str, None]:
        """Generates the answer to a message, piece by piece, and remembers both: what there is of it, if cut short.

        `num_dropped` is the number of old turns that had to go. Raises `InvalidRequestError` for a message that does
        not fit even alone, and whatever `LocalRuntime.stream` raises; the conversation is then as it was before.
        """
        before, pieces = list(self._turns), list[str]()
        self._turns.append({"role": "user", "content": message})
        try:
            token_ids = self._fit()
            max_tokens = min(self._max_tokens, self._runtime.max_context - len(token_ids))
            # Asked for anew each time: without --seed, the same question need not get the same answer.
            stream = self._runtime.stream(token_ids, sampling_params(self._args), max_tokens=max_tokens)
            async with contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    if isinstance(chunk, Chunk):
                        pieces.append(chunk.text)
                        yield chunk.text
        except Exception:
            self._turns = before
            raise
        finally:
            if len(self._turns) % 2:
                self._turns.append({"role": "assistant", "content": "".join(pieces)})

    def _fit(self) -> tuple[int, ...]:
        """The prompt, after as many of the oldest turns were dropped as it takes to leave room for an answer."""
        context, self.num_dropped = self._runtime.max_context, 0
        room = min(self._max_tokens, context // _ANSWER_SHARE)
        while True:
            token_ids = self._runtime.encode([*self._system, *self._turns])
            if len(token_ids) + room <= context or (len(self._turns) == 1 and len(token_ids) < context):
                return token_ids
            if len(self._turns) == 1:
                raise InvalidRequestError(
                    f"the message makes a prompt of {len(token_ids)} tokens; the context is {context}: shorten it"
                )
            del self._turns[:2]
            self.num_dropped += 1
