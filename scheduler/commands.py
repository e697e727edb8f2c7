"""What goes into the scheduler and what comes out: frozen dataclasses of plain values, the wire format too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

DUE_S = 600.0
"""When a program should be over that does not say."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The scheduler reads `stop_token_ids`; the rest is for the engine.

    Attributes:
        temperature: 0 chooses the most likely token.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probabilities reach this sum.
        min_p: Drop tokens less likely than this share of the most likely one.
        repetition_penalty: Divides (multiplies, if negative) the logits of every token seen so far (CTRL, 2019).
        presence_penalty: Subtracted from the logit of every token generated so far.
        frequency_penalty: The same, times the number of occurrences.
        logit_bias: Pairs of token id and a value added to its logit.
        seed: The same seed gives the same tokens, whatever else is in the batch.
        stop: Strings that end the call; the text ends before them.
        stop_token_ids: Tokens that end the call; the token is reported, its text is not.
        logprobs: How many most likely alternatives to report with each token; None reports no logprobs at all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class OpenProgram:
    """Begins a program. Its calls name it; its account is kept until `EndProgram`.

    Attributes:
        kind: Programs of one kind behave alike: what is learned of pauses and outputs is kept by it.
        tenant: Whose it is. Nothing is shared between tenants.
        priority: Programs of a higher one go first.
        due_s: Seconds from now by which it should be over. Of the same priority, what is due first goes first.
    """

    program_id: str
    kind: str = ""
    tenant: str = ""
    priority: int = 0
    due_s: float = DUE_S


@dataclass(frozen=True, slots=True)
class DeclareNode:
    """Tells a node of a program's graph, as soon as it is known; declared again, it gets more inputs.

    Attributes:
        kind: `llm`, `tool`, or another word for what is outside.
        name: Of the function, for people.
        inputs: Nodes whose values it needs; they were declared before.
        extends: The node whose conversation it continues.
        group: Shared by the branches of one fan-out.
        typical_s: Seconds that it usually takes, if that is known; what is observed soon outweighs it.
    """

    program_id: str
    node_id: str
    kind: str
    name: str = ""
    inputs: tuple[str, ...] = ()
    extends: str | None = None
    group: str | None = None
    typical_s: float | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """A declared node runs outside the engine from now on, or since `ago_s` seconds: a tool, a person."""

    program_id: str
    node_id: str
    ago_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Resume:
    """What was waited for has come."""

    program_id: str
    node_id: str


@dataclass(frozen=True, slots=True)
class SubmitCall:
    """Adds a call to a program.

    Attributes:
        node_id: The declared node whose value the call computes.
        extends: An ended call of the same program whose tokens this prompt begins with: its unfinished last page, if
            it is still there, is taken over. The full pages need no such hint.
        token_ids: The prompt, or its leading part if the call is `open`.
        max_tokens: Most tokens to generate; None means as many as the context holds.
        open: The prompt is not complete: compute what is known, sample nothing, wait for `AppendPrompt`.
        fork_of: A live call with the same complete prompt. This call shares its pages, and computes the last prompt
            token only.
        constraint: What the output must look like, in the engine's grammar language. The scheduler does not read it.
        num_generated: How many tokens at the end of `token_ids` are output already: the call began on another engine,
            and goes on here as if it had been here all the time.
    """

    call_id: str
    program_id: str
    token_ids: Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    open: bool = False
    fork_of: str | None = None
    node_id: str | None = None
    extends: str | None = None
    constraint: str | None = None
    num_generated: int = 0


@dataclass(frozen=True, slots=True)
class AppendPrompt:
    """Appends tokens to the prompt of an open call; `close` completes it."""

    call_id: str
    token_ids: Sequence[int]
    close: bool = False


@dataclass(frozen=True, slots=True)
class AbortCall:
    """Ends a call, at any moment."""

    call_id: str


HintAction: TypeAlias = Literal["retain", "demote", "release"]


@dataclass(frozen=True, slots=True)
class Hint:
    """What is known outside of the pages that a program has left and may come back to. `HintAnswered` is the answer.

    Attributes:
        request_id: Names the answer.
        action: `retain` has the program come back at once, for as long as `seconds` says; `demote` has it come back
            last; `release` has it not come back. The first two hold until it does.
        seconds: How long to retain.
    """

    request_id: str
    program_id: str
    action: HintAction
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class EndProgram:
    """Ends a program: its live calls are aborted and its account is closed."""

    program_id: str


@dataclass(frozen=True, slots=True)
class Prepare:
    """Compiles a constraint beside the steps, so that a call of the tenant which has it need not wait.

    Answered by `Prepared`, or by `Rejected` as overloaded if it took too long.
    """

    request_id: str
    constraint: str
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Inspect:
    """Asks what is there; answered by `Inspected`.

    Attributes:
        subject: A program, which is told in detail then; None for all, each in a few words.
    """

    request_id: str
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class Watch:
    """Asks for every decision from now on, in `Decided` events, or for no more of them."""

    on: bool


Command: TypeAlias = (
    OpenProgram
    | DeclareNode
    | SubmitCall
    | AppendPrompt
    | AbortCall
    | Wait
    | Resume
    | Hint
    | EndProgram
    | Prepare
    | Inspect
    | Watch
)

ErrorCode: TypeAlias = Literal[
    "duplicate_id",
    "unknown_program",
    "unknown_node",
    "unknown_call",
    "not_open",
    "bad_fork",
    "empty_prompt",
    "bad_deadline",
    "bad_token",
    "bad_max_tokens",
    "bad_sampling",
    "bad_constraint",
    "bad_text",
    "prompt_too_long",
    "overloaded",
    "engine",
]
FinishReason: TypeAlias = Literal["stop", "length", "aborted", "error"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the tokens and the time of a call, or of a whole program, went.

    Attributes:
        cached: Prompt tokens whose KV was found in the prefix tree or shared by a fork.
        prefilled: Prompt tokens computed for the first time.
        re_prefilled: Tokens computed again, because their pages had been taken away.
        decoded: Tokens generated.
        steps: Steps that computed something for it.
        queued_s: Seconds in which it had work to do and held no slot.
        service_s: Attained service: its share, by tokens, of the duration of its steps.
    """

    cached: int = 0
    prefilled: int = 0
    re_prefilled: int = 0
    decoded: int = 0
    steps: int = 0
    queued_s: float = 0.0
    service_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of probabilities, before penalties and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokensOut:
    """Tokens that a call has generated. `text` holds back what may be half a character or part of a stop string."""

    call_id: str
    token_ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class CallFinished:
    """The last event of a call. `text` is what was still held back."""

    call_id: str
    reason: FinishReason
    usage: Usage
    text: str = ""
    error: ErrorCode | None = None
    message: str = ""


@dataclass(frozen=True, slots=True)
class PathStep:
    """A node on a critical path, and the seconds that the path spent on it."""

    node_id: str
    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ProgramEnded:
    """The last event of a program, with its account.

    Attributes:
        calls, nodes: How many it had.
        duration_s: From `OpenProgram` to `EndProgram`.
        tool_wait_s: Sum over its tools of the time from `Wait` to `Resume`.
        critical_path: The chain of nodes that its end waited for.
    """

    program_id: str
    calls: int
    usage: Usage
    nodes: int = 0
    duration_s: float = 0.0
    tool_wait_s: float = 0.0
    critical_path: tuple[PathStep, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A command that names something that is not there, or not in that state. Nothing was changed."""

    subject: str
    error: ErrorCode
    message: str


HintOutcome: TypeAlias = Literal["granted", "clipped", "dropped"]


@dataclass(frozen=True, slots=True)
class HintAnswered:
    """What became of a hint.

    Attributes:
        outcome: All of it was done, some, or nothing.
        num_tokens: Computed tokens that it was done for.
        seconds: For how long they are retained, from now.
        reason: Why not all.
    """

    request_id: str
    program_id: str
    outcome: HintOutcome
    num_tokens: int
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the scheduler's log: what it did, to which call or program, and why."""

    time: float
    action: str
    subject: str
    reason: str
    program_id: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What became of a `Prepare`: JSON pointers of what the grammar does not guarantee, or why there is none."""

    request_id: str
    unenforced: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Inspected:
    """What was there when an `Inspect` came, in values that JSON knows. `inspection.py` says what is in it."""

    request_id: str
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decided:
    """What was decided since the last such event."""

    decisions: tuple[Decision, ...]


Event: TypeAlias = TokensOut | CallFinished | ProgramEnded | HintAnswered | Rejected | Prepared | Inspected | Decided
