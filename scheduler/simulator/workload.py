"""Programs to be run: the one form that every trace is read into.

A prompt is a list of block ids, not of tokens, as the published traces have it: equal ids are equal tokens. Tokens are
made from ids only when a call is submitted, because a program of 80 calls of 100,000 tokens would hold 32 MB of them.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

PauseKind = Literal["tool", "person", "agent", "none"]
Half = Literal["tune", "report"]

NUM_BLOCK_IDS = 2**30


@dataclass(frozen=True, slots=True)
class Blocks:
    """Block ids of a prompt, run by run: a run `(start, count)` is the ids start, start + 1, ... start + count - 1.

    Neighbouring runs that continue each other are one, so equal lists of ids are equal objects. Make one with
    `from_runs` or `from_ids`.
    """

    runs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_runs(cls, runs: Iterable[tuple[int, int]]) -> Blocks:
        """Blocks of runs, which may be empty or continue each other.

        Raises:
            ValueError: a run has a negative length, or ids outside 0 .. 2**30 - 1.
        """
        merged: list[tuple[int, int]] = []
        for start, count in runs:
            if start < 0 or count < 0 or start + count > NUM_BLOCK_IDS:
                raise ValueError(f"a run of blocks cannot be ({start}, {count})")
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + count)
            elif count:
                merged.append((start, count))
        return cls(tuple(merged))

    @classmethod
    def from_ids(cls, ids: Iterable[int]) -> Blocks:
        """Blocks of single ids."""
        return cls.from_runs((block, 1) for block in ids)

    def __len__(self) -> int:
        return sum(count for _, count in self.runs)

    def __iter__(self) -> Iterator[int]:
        for start, count in self.runs:
            yield from range(start, start + count)

    def __add__(self, other: Blocks) -> Blocks:
        return Blocks.from_runs(self.runs + other.runs)

    def part(self, begin: int, end: int) -> Blocks:
        """The blocks from position `begin` to position `end`, or to the last."""
        runs, position = [], 0
        for start, count in self.runs:
            low, high = max(begin - position, 0), min(end - position, count)
            if low < high:
                runs.append((start + low, high - low))
            position += count
        return Blocks.from_runs(runs)

    def starts_with(self, other: Blocks) -> bool:
        """Whether the first blocks are the other's."""
        return self.part(0, len(other)) == other


@dataclass(frozen=True, slots=True)
class CallSpec:
    """One call of a program.

    Attributes:
        stream: the conversation within the program that this call goes on with: "main", or the name of a sub-agent. A
            call extends the last call of its stream.
        prompt: the blocks of the prompt. The last one may be filled in part only.
        prompt_tokens: tokens of the prompt; blocks beyond them do not count.
        output_tokens: tokens that the call generates, at least 1.
        pause_s: seconds from the last end that it waits for to this call, as the client takes them.
        pause_kind: what the client waits for: a tool, a person, another agent, or nothing.
        tool: name of that tool, empty if it is not known.
        after: the calls of the program, by index, whose ends it waits for. None is the call before it, and for the
            first one nothing: the program begins with it. Empty is the beginning of the program.
        foreseen: whether it was declared while it could not begin yet, so that a scheduler could know of it.
    """

    stream: str
    prompt: Blocks
    prompt_tokens: int
    output_tokens: int
    pause_s: float = 0.0
    pause_kind: PauseKind = "none"
    tool: str = ""
    after: tuple[int, ...] | None = None
    foreseen: bool = False

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(f"a call needs tokens: {self.prompt_tokens} in, {self.output_tokens} out")
        if not self.pause_s >= 0:
            raise ValueError(f"a pause takes 0 seconds or more, not {self.pause_s}")


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """One program. Its calls run one after the other, unless they say what they wait for.

    Attributes:
        start_s: seconds from the beginning of the workload.
        salt: scope of the block ids. Programs of one salt share the blocks that have the same id; others share nothing.

    Raises:
        ValueError: a call waits for one that is not before it, or not for the one that it extends.
    """

    id: str
    kind: str
    start_s: float
    calls: tuple[CallSpec, ...]
    salt: str

    def __post_init__(self) -> None:
        if not self.has_graph:
            return
        ancestors: list[int] = []  # of each call, a bit for each call that has ended when it begins
        last: dict[str, int] = {}
        for index, call in enumerate(self.calls):
            after = self.waits_for(index)
            if not all(0 <= other < index for other in after):
                raise ValueError(
                    f"program {self.id}: call {index} cannot wait for {list(after)}, only for calls before it"
                )
            ancestors.append(0)
            for other in after:
                ancestors[index] |= ancestors[other] | 1 << other
            extended = last.get(call.stream)
            if extended is not None and not ancestors[index] >> extended & 1:
                raise ValueError(f"program {self.id}: call {index} extends call {extended}, and does not wait for it")
            last[call.stream] = index

    @property
    def has_graph(self) -> bool:
        """Whether its calls say what they wait for."""
        return any(call.after is not None for call in self.calls)

    def waits_for(self, index: int) -> tuple[int, ...]:
        """The calls whose ends a call waits for."""
        after = self.calls[index].after
        return after if after is not None else tuple(range(index))[-1:]

    def pause_s(self, index: int) -> float:
        """Seconds from the last of those ends, or from the beginning of the program, to a call."""
        begins_it = index == 0 and self.calls[0].after is None
        return 0.0 if begins_it else self.calls[index].pause_s

    def following(self, index: int) -> CallSpec | None:
        """The next call of the same stream."""
        stream = self.calls[index].stream
        return next((call for call in self.calls[index + 1 :] if call.stream == stream), None)


@dataclass(frozen=True, slots=True)
class Workload:
    """Programs whose blocks hold `block_tokens` tokens each."""

    name: str
    block_tokens: int
    programs: tuple[ProgramSpec, ...]

    def prompt_ids(self, program: ProgramSpec, index: int) -> array[int]:
        """Token ids of a call's prompt."""
        call = program.calls[index]
        return token_ids(call.prompt, call.prompt_tokens, self.block_tokens, program.salt)

    def output_ids(self, program: ProgramSpec, index: int) -> array[int]:
        """Token ids that a call generates: see `next_output`."""
        fresh = f"{program.salt}/{program.id}/{index}"
        return next_output(program.calls[index], program.following(index), self.block_tokens, program.salt, fresh)


def token_ids(blocks: Blocks, prompt_tokens: int, block_tokens: int, salt: str) -> array[int]:
    """The first `prompt_tokens` token ids of blocks.

    A block of a salt begins with an id of its own, and goes on with one that all blocks of the salt have in common. So
    two prompts agree up to the first block that differs, and making 100,000 ids takes a fraction of a millisecond.
    Different salts begin alike with a chance of about 1 in 2**30.

    Raises:
        ValueError: there are fewer blocks than that.
    """
    return _ids(blocks, 0, prompt_tokens, block_tokens, salt)


def next_output(call: CallSpec, following: CallSpec | None, block_tokens: int, salt: str, fresh: str) -> array[int]:
    """Token ids that a call generates, so that the next call of its stream continues them.

    If the following prompt keeps this prompt whole, the output is what it says after it; where it says nothing, or if
    it does not keep it, the ids are new ones that nothing else has. `fresh` names those: another one for each call.

    ::

        prompt of call        | block 1 | block 2 | bl |
        following prompt      | block 1 | block 2 | block 3 | block 4 |
        output of call                            |oooooooo.........|      o: block 3 from where the prompt ends
    """
    begin, end = call.prompt_tokens, call.prompt_tokens + call.output_tokens
    output = array("i")
    num_blocks = -(-begin // block_tokens)
    if following is not None and following.prompt.part(0, num_blocks) == call.prompt.part(0, num_blocks):
        end_known = min(end, following.prompt_tokens)
        if begin < end_known:
            output = _ids(following.prompt, begin, end_known, block_tokens, salt)
    return output + array("i", [_origin(f"output of {fresh}")]) * (end - begin - len(output))


def close_prompts(calls: Sequence[CallSpec], block_tokens: int, fresh_id: int) -> tuple[CallSpec, ...]:
    """Gives each prompt that lacks its last block one.

    Traces that know full blocks only do not say what the last, unfinished one holds. Where the next prompt of the
    stream keeps all known blocks, it is taken to keep the rest too, and the last block is the next prompt's at that
    place. Elsewhere it is new; new ids count from `fresh_id`.

    Raises:
        ValueError: a prompt lacks more than its last block.
    """
    closed: list[CallSpec] = []
    following: dict[str, Blocks] = {}
    for call in reversed(calls):
        num_blocks = -(-call.prompt_tokens // block_tokens)
        prompt = call.prompt.part(0, num_blocks)
        known = len(prompt)
        if known < num_blocks - 1:
            raise ValueError(f"{known} blocks of {block_tokens} tokens for a prompt of {call.prompt_tokens} tokens")
        if known < num_blocks:
            after = following.get(call.stream, Blocks())
            last = after.part(known, known + 1) if after.starts_with(prompt) else Blocks()
            if not last:
                last, fresh_id = Blocks(((fresh_id, 1),)), fresh_id + 1
            prompt += last
        following[call.stream] = prompt
        closed.append(replace(call, prompt=prompt))
    return tuple(reversed(closed))


def clip(program: ProgramSpec, max_calls: int = 80, max_tokens: int = 150_000) -> ProgramSpec:
    """A program of no more calls than `max_calls`, each of no more tokens than `max_tokens`, prompt and output.

    What is too long loses the end of its prompt; the output stays, unless it is too long alone.

    Raises:
        ValueError: `max_calls` is below 1 or `max_tokens` below 2.
    """
    if max_calls < 1 or max_tokens < 2:
        raise ValueError(f"nothing is left of a program of {max_calls} calls of {max_tokens} tokens")
    calls = []
    for call in program.calls[:max_calls]:
        output = min(call.output_tokens, max_tokens - 1)
        prompt = min(call.prompt_tokens, max_tokens - output)
        calls.append(replace(call, prompt_tokens=prompt, output_tokens=output))
    return replace(program, calls=tuple(calls))


def cap_pauses(program: ProgramSpec, seconds: float) -> ProgramSpec:
    """A program with no pause longer than that."""
    return replace(program, calls=tuple(replace(call, pause_s=min(call.pause_s, seconds)) for call in program.calls))


def largest_call_tokens(programs: Iterable[ProgramSpec]) -> int:
    """Tokens, prompt and output, of the largest call: a pool must hold them."""
    return max((call.prompt_tokens + call.output_tokens for program in programs for call in program.calls), default=0)


def half(program_id: str) -> Half:
    """The half that a program belongs to: policies are tuned on one and reported on the other, always the same."""
    return "tune" if hashlib.sha256(program_id.encode()).digest()[0] < 128 else "report"


def select(workload: Workload, seed: int, n: int) -> Workload:
    """A sample of `n` programs, in the order of the workload; the same seed gives the same.

    Raises:
        ValueError: the workload has fewer programs.
    """
    if not 0 <= n <= len(workload.programs):
        raise ValueError(f"{workload.name} has {len(workload.programs)} programs, not {n}")
    chosen = sorted(random.Random(seed).sample(range(len(workload.programs)), n))
    return replace(workload, programs=tuple(workload.programs[index] for index in chosen))


def _ids(blocks: Blocks, begin: int, end: int, block_tokens: int, salt: str) -> array[int]:
    origin = _origin(salt)
    first = begin // block_tokens
    part = blocks.part(first, -(-end // block_tokens))
    if (first + len(part)) * block_tokens < end:
        raise ValueError(f"{len(blocks)} blocks of {block_tokens} tokens do not hold {end} tokens")
    ids = array("i", [origin]) * (len(part) * block_tokens)
    heads = array("i")
    for start, count in part.runs:
        heads.extend(range(origin + 1 + start, origin + 1 + start + count))
    ids[::block_tokens] = heads
    return ids[begin - first * block_tokens : end - first * block_tokens]


def _origin(name: str) -> int:
    """An id below half of the ids, so that blocks can be counted from it."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % (NUM_BLOCK_IDS - 1)
