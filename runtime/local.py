"""A model and its engine in this process: text in, text out."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from treadle.dsl import Program, use_backend
from treadle.dsl.node import Node
from treadle.grammar import GrammarError, constraint_to_json
from treadle.runtime.constraints import ConstraintLike, constraint_from
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.loading import Check, StoppableCheckpoint, fetch_if_missing, load_in_thread, open_model
from treadle.runtime.models.config import ModelConfig
from treadle.scheduler import FinishReason, SamplingParams, SubmitCall, TokenLogprob, Usage

if TYPE_CHECKING:
    from treadle.grammar.compiler import Compiler
    from treadle.runtime.engine.client import EngineClient, ThreadedEngine
    from treadle.runtime.engine.session import CallStream, Session
    from treadle.runtime.executor.executor import Executor
    from treadle.runtime.recorder import Recorder
    from treadle.runtime.text.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or chat messages such as `{"role": "user", "content": "Hello"}`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a completion as it is generated."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation. `token_ids` are exactly what the model generated, the stop token included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()


class LocalRuntime:
    """A loaded model that answers many calls at once. Made by `local`.

    Within its scope, programs written with `treadle.dsl` run on it.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        compiler: Compiler | None,
        engine: ThreadedEngine,
        recorder: Recorder | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self._compiler = compiler
        self._engine = engine
        self._recorder = recorder
        self._stack = contextlib.AsyncExitStack()
        self._session: Session | None = None
        self._executor: Executor | None = None
        self._program_id = ""

    @property
    def max_context(self) -> int:
        """Most tokens of a call, prompt and generation together."""
        return self._engine.max_context

    async def __aenter__(self) -> LocalRuntime:
        from treadle.runtime.engine.session import Session

        self._stack.callback(self._engine.close)
        client: EngineClient = self._engine
        if self._recorder is not None:
            from treadle.runtime.recorder import RecordedEngine

            client = RecordedEngine(self._engine, self._recorder)
        self._session = await self._stack.enter_async_context(Session(client))
        self._program_id = self._session.open_program(kind="generate")
        if self._recorder is not None:
            self._recorder.separate.add(self._program_id)
        if self.tokenizer is not None and self._compiler is not None:
            from treadle.runtime.executor.executor import Executor

            self._stack.callback(self._compiler.close)
            self._executor = Executor(self.name, self._session, self.tokenizer, self._compiler)
            self._stack.push_async_callback(self._executor.close)
            self._stack.enter_context(use_backend(self._executor))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def close_engine(self) -> None:
        """Ends the engine of a runtime whose scope was never entered."""
        if self._compiler is not None:
            self._compiler.close()
        self._engine.close()

    @property
    def programs(self) -> Sequence[Program]:
        """The programs opened last, the oldest first, those that have ended included."""
        return self._executor.programs if self._executor is not None else ()

    async def end_programs(self) -> None:
        """Ends the programs that are still open, as that of a call outside of any scope is for a moment."""
        if self._executor is not None:
            await self._executor.close()

    @property
    def tokens_generated(self) -> int:
        """Tokens that all calls have generated so far."""
        return self._session.tokens_generated if self._session is not None else 0

    @contextlib.contextmanager
    def watch(self, watcher: Callable[[Node], None]) -> Iterator[None]:
        """Calls `watcher` with each node of a program that begins or ends, while the scope lasts."""
        watchers = self._executor.watchers if self._executor is not None else []
        watchers.append(watcher)
        try:
            yield
        finally:
            watchers.remove(watcher)

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = None,
        constraint: ConstraintLike | None = None,
    ) -> Completion:
        """Generates one completion. See `generate_many` for the parameters and what it raises."""
        (completion,) = await self.generate_many(prompt, sampling, max_tokens=max_tokens, constraint=constraint)
        return completion

    async def generate_many(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = None,
        constraint: ConstraintLike | None = None,
        n: int = 1,
    ) -> list[Completion]:
        """Generates `n` completions of one prompt, which is computed once; their seeds are seed, seed + 1, ...

        With a constraint, a completion that ended with "stop" satisfies it; one that reached `max_tokens` is only the
        beginning of such a text. Raises `InvalidRequestError` for a prompt, a parameter or a constraint that cannot be,
        `CallError` if the call fails while it runs, `EngineClosedError` if the runtime is closed. Cancelling the task
        aborts the calls.
        """
        if n < 1:
            raise InvalidRequestError(f"n is {n}; it must be at least 1")
        if n > self._engine.max_calls:
            most = self._engine.max_calls
            raise InvalidRequestError(f"n is {n}; the engine holds at most {most} calls: ask for fewer at a time")
        token_ids = self.encode(prompt)
        grammar = await self._compiled(constraint)
        streams = self._submit(token_ids, self._resolve(sampling), max_tokens, grammar, n)
        try:
            return [await _collect(stream, len(token_ids)) for stream in streams]
        finally:
            for stream in streams:
                stream.abort()

    async def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        max_tokens: int | None = None,
        constraint: ConstraintLike | None = None,
    ) -> AsyncGenerator[Chunk | Completion, None]:
        """Generates one completion: a `Chunk` for each step, and the whole `Completion` at the end.

        Raises as `generate_many` does. Closing the iterator aborts the call.
        """
        token_ids = self.encode(prompt)
        grammar = await self._compiled(constraint)
        (stream,) = self._submit(token_ids, self._resolve(sampling), max_tokens, grammar, 1)
        chunks: list[Chunk] = []
        try:
            async for tokens in stream:
                chunks.append(Chunk(tokens.text, tokens.token_ids, tokens.logprobs))
                yield chunks[-1]
            assert stream.finished is not None
            if stream.finished.text:
                chunks.append(Chunk(stream.finished.text))
                yield chunks[-1]
            yield _completion(chunks, stream, len(token_ids))
        finally:
            stream.abort()

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt. Only a chat template's own special tokens are special; text stays text."""
        if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
            return tuple(item for item in prompt if isinstance(item, int))
        if self.tokenizer is None:
            raise InvalidRequestError(f"{self.name} has no tokenizer; give token ids")
        if isinstance(prompt, str):
            bos = self.tokenizer.bos_token_id
            begin = (bos,) if self.tokenizer.add_bos and bos is not None else ()
            return (*begin, *self.tokenizer.encode(prompt))
        from treadle.runtime.text.chat_template import encode_chat

        return tuple(encode_chat(self.tokenizer, [item for item in prompt if isinstance(item, Mapping)]))

    def _resolve(self, sampling: SamplingParams | None) -> SamplingParams:
        """Adds the ids that end a turn."""
        params = sampling or SamplingParams(seed=secrets.randbits(62))
        if params.stop_token_ids or self.tokenizer is None:
            return params
        return replace(params, stop_token_ids=self.tokenizer.eos_token_ids)

    async def _compiled(self, given: ConstraintLike | None) -> str | None:
        """A constraint in wire form, compiled beside the engine, in whose cache it is from now on."""
        if given is None:
            return None
        constraint = constraint_from(given)
        if self._compiler is None:
            raise InvalidRequestError(f"{self.name} has no tokenizer, so it cannot follow a constraint; leave it out")
        try:
            await self._compiler.compile_async(constraint)
        except GrammarError as error:
            raise InvalidRequestError(str(error)) from error
        return constraint_to_json(constraint)

    def _submit(
        self, token_ids: tuple[int, ...], params: SamplingParams, max_tokens: int | None, grammar: str | None, n: int
    ) -> list[CallStream]:
        assert self._session is not None, "use `async with`"
        ids = [self._session.new_id("call") for _ in range(n)]
        calls = [
            SubmitCall(
                call_id,
                self._program_id,
                token_ids,
                replace(params, seed=params.seed + index),
                max_tokens,
                fork_of=ids[0] if index else None,
                constraint=grammar,
            )
            for index, call_id in enumerate(ids)
        ]
        return self._session.submit(*calls)


@contextlib.asynccontextmanager
async def local(
    model: str | Path,
    config: EngineConfig | None = None,
    *,
    pull: bool = True,
    record: str | Path | None = None,
) -> AsyncIterator[LocalRuntime]:
    """Loads a model into this process and runs it until the scope is left.

    ::

        async with local("smollm2") as runtime:
            answer = await runtime.generate([{"role": "user", "content": "What is the capital of France?"}])
            print(answer.text)

    Args:
        model: A known name (`treadle models` lists them), a `.gguf` file, a folder with safetensors, or
            `random:SHAPE` for random weights of a named shape.
        config: Sizes, policies and switches of the engine.
        pull: Whether a known model that is not cached is downloaded.
        record: A file to which a line is appended for each program that ends, for `treadle simulate --trace`. It has
            the shape of what was asked, lengths and times, and no text.

    Raises `ModelError` if the model cannot be had, `InvalidRequestError` for a configuration that cannot be, or a file
    that cannot be written.
    Cancelling it, as Ctrl-C does, works while the model is still downloaded or loaded.
    """
    name, settings = str(model), config or EngineConfig()
    recorder = None
    if record is not None:
        from treadle.runtime.recorder import Recorder

        recorder = Recorder(record)

    def work(check: Check) -> LocalRuntime:
        if pull:
            fetch_if_missing(name, check)
        return load(name, settings, pull=False, check=check, recorder=recorder)

    async with await load_in_thread(work, LocalRuntime.close_engine) as runtime:
        yield runtime


def load(
    model: str,
    config: EngineConfig,
    *,
    pull: bool,
    check: Check = lambda *_: None,
    recorder: Recorder | None = None,
) -> LocalRuntime:
    """Loads a model and starts its engine, without an event loop; enter the result with `async with`. As `local`."""
    from treadle.runtime.engine.build import build_engine
    from treadle.runtime.engine.client import ThreadedEngine

    check()
    checkpoint, tokenizer = open_model(model, pull=pull)
    engine = build_engine(StoppableCheckpoint(checkpoint, check), tokenizer, config)
    return LocalRuntime(model, checkpoint.config, tokenizer, engine.compiler, ThreadedEngine(engine), recorder)


async def _collect(stream: CallStream, num_prompt_tokens: int) -> Completion:
    chunks = [Chunk(tokens.text, tokens.token_ids, tokens.logprobs) async for tokens in stream]
    assert stream.finished is not None
    return _completion([*chunks, Chunk(stream.finished.text)], stream, num_prompt_tokens)


def _completion(chunks: Sequence[Chunk], stream: CallStream, num_prompt_tokens: int) -> Completion:
    assert stream.finished is not None
    return Completion(
        "".join(chunk.text for chunk in chunks),
        tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        stream.finished.reason,
        num_prompt_tokens,
        stream.finished.usage,
        tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
    )
