"""Constraints compiled against a model's vocabulary, each once."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from treadle.grammar.constraints import EBNF, Choice, Constraint, JSONSchema, Regex, ToolTurn, constraint_to_json
from treadle.grammar.errors import GrammarTimeoutError, InvalidGrammarError
from treadle.grammar.matcher import ContentGrammar, Grammar
from treadle.grammar.preflight import check_text
from treadle.grammar.sources import Source, call_source, choice_source, ebnf_source, regex_source, schema_source
from treadle.grammar.tool_turn import ToolTurnGrammar
from treadle.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    import xgrammar

NUM_THREADS = 2
TIMEOUT = 10.0


class Compiler:
    """Compiles constraints for one vocabulary. Safe to share among threads.

    Grammars are kept, the least recently used dropped first, while they take up at most `cache_bytes` together.
    Threads that ask for one grammar at once compile it once. The tools of a turn are compiled and kept one by one, so
    that turns with other sets of the same tools share them.

    Grammars are kept apart by `salt`: who has one cannot tell, by the time either, what was compiled for another.
    """

    def __init__(self, vocabulary: Vocabulary, cache_bytes: int = 256 << 20) -> None:
        self._vocabulary = vocabulary
        self._cache_bytes = cache_bytes
        self._backends: dict[bool, xgrammar.GrammarCompiler] = {}
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._kept_bytes = 0
        # A turn holds its tools' grammars, also where these are no longer kept by themselves.
        self._holders: dict[Grammar, int] = {}
        self._under_way: dict[str, Future[Grammar]] = {}
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")

    @property
    def cached_bytes(self) -> int:
        """What the grammars in the cache take up."""
        return self._kept_bytes

    def compile(self, constraint: Constraint, salt: str = "") -> Grammar:
        """The grammar of a constraint. Blocks while compiling; raises a `GrammarError` that names what is wrong."""
        if isinstance(constraint, ToolTurn):
            return self._once(_key(constraint, salt), lambda: self._tool_turn(constraint, salt))
        return self._content(constraint_to_json(constraint), lambda: _source(constraint), salt)

    async def compile_async(self, constraint: Constraint, timeout: float = TIMEOUT) -> Grammar:
        """As `compile`, off the event loop. Raises `GrammarTimeoutError` after `timeout` seconds, queueing included."""
        with self._lock:
            kept = self._kept.get(key := _key(constraint))
            if kept is not None:
                self._kept.move_to_end(key)
                return kept
        work = asyncio.get_running_loop().run_in_executor(self._pool, self.compile, constraint)
        done, _ = await asyncio.wait({work}, timeout=timeout)
        if not done:
            work.cancel()
            raise GrammarTimeoutError(timeout)
        return work.result()

    def compile_soon(
        self,
        constraint: Constraint,
        done: Callable[[Grammar | BaseException], object],
        salt: str = "",
        timeout: float = TIMEOUT,
    ) -> None:
        """As `compile_async`, without an event loop: `done` is called once, in any thread, with what came of it."""
        first = threading.Lock()

        def tell(result: Grammar | BaseException) -> None:
            if first.acquire(blocking=False):
                done(result)

        def expire() -> None:
            work.cancel()
            tell(GrammarTimeoutError(timeout))

        def compiled(work: Future[Grammar]) -> None:
            timer.cancel()
            if not work.cancelled():
                tell(work.exception() or work.result())

        timer = threading.Timer(timeout, expire)
        timer.daemon = True
        work = self._pool.submit(self.compile, constraint, salt)
        timer.start()
        work.add_done_callback(compiled)

    def close(self) -> None:
        """Stops the threads; compiles that have not begun are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _tool_turn(self, turn: ToolTurn, salt: str) -> Grammar:
        if not turn.tools:
            raise InvalidGrammarError("a tool turn needs at least one tool. Leave the constraint out if there is none.")
        names = [tool.name for tool in turn.tools]
        if len(set(names)) < len(names) or not all(names):
            raise InvalidGrammarError("the tools of a turn need names, each another one. Rename or remove doubles.")
        check_text("".join(names), "the tools' names")
        closing = self._vocabulary.close_id is None
        calls = tuple(
            self._content(
                f"call {closing:d} {len(tool.name)} {tool.name} {tool.parameters}",
                lambda tool=tool: call_source(tool, closing=closing),  # type: ignore[misc]
                salt,
            )
            for tool in turn.tools
        )
        answer = None
        if turn.answer is not None:
            schema = turn.answer
            answer = self._content(
                constraint_to_json(schema), lambda: schema_source(schema.schema, schema.strict), salt
            )
        return ToolTurnGrammar(self._vocabulary, turn, calls, answer)

    def _content(self, name: str, source: Callable[[], Source], salt: str) -> ContentGrammar:
        grammar = self._once(_salted(name, salt), lambda: self._compile(source(), salt))
        assert isinstance(grammar, ContentGrammar)
        return grammar

    def _compile(self, source: Source, salt: str) -> Grammar:
        try:
            compiled = self._engine(shared=not salt).compile_grammar(source.text)
        except RuntimeError as error:
            raise InvalidGrammarError(f"the grammar does not compile: {str(error).strip()[-400:]}") from error
        return ContentGrammar(compiled, source.unenforced, self._vocabulary)

    def _engine(self, *, shared: bool) -> xgrammar.GrammarCompiler:
        """The library's compiler: one keeps parts of grammars for whoever has no salt, the other keeps nothing."""
        with self._lock:
            if shared not in self._backends:
                self._backends[shared] = self._vocabulary.backend_compiler(self._cache_bytes // 2 if shared else 0)
            return self._backends[shared]

    def _once(self, key: str, work: Callable[[], Grammar]) -> Grammar:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            future = self._under_way.get(key)
            owner = future is None
            if future is None:
                future = self._under_way[key] = Future()
        if not owner:
            return future.result()
        try:
            grammar = work()
        except BaseException as error:
            with self._lock:
                del self._under_way[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._under_way[key]
            self._keep(key, grammar)
        future.set_result(grammar)
        return grammar

    def _keep(self, key: str, grammar: Grammar) -> None:
        self._kept[key] = grammar
        self._kept_bytes += len(key) + self._hold(grammar, 1)
        while self._kept_bytes > self._cache_bytes // 2:
            old_key, old = self._kept.popitem(last=False)
            self._kept_bytes -= len(old_key) + self._hold(old, -1)

    def _hold(self, grammar: Grammar, count: int) -> int:
        """Counts the holders of a grammar and its parts. Returns the bytes that this takes up or sets free."""
        num_bytes = 0
        for part in (grammar, *grammar.parts):
            before = self._holders.get(part, 0)
            self._holders[part] = before + count
            if 0 in (before, before + count):
                num_bytes += part.num_bytes
            if not before + count:
                del self._holders[part]
        return num_bytes


def _key(constraint: Constraint, salt: str = "") -> str:
    return _salted(constraint_to_json(constraint), salt)


def _salted(name: str, salt: str) -> str:
    return f"{len(salt)} {salt}{name}"


def _source(constraint: Constraint) -> Source:
    match constraint:
        case JSONSchema(schema, strict):
            return schema_source(schema, strict)
        case Regex(pattern):
            return regex_source(check_text(pattern, "the pattern"))
        case EBNF(grammar):
            return ebnf_source(check_text(grammar, "the grammar"))
        case Choice(options):
            return choice_source(options)
    raise TypeError(f"{type(constraint).__name__} is no constraint")
