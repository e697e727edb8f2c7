"""The errors of workflows. Each message says what happened, on which line, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from treadle.dsl.location import Location

if TYPE_CHECKING:
    from treadle.dsl.node import Node


class DSLError(Exception):
    """Base of every error that a workflow can meet."""


class NoBackendError(DSLError, RuntimeError):
    """Nothing is there to run the call."""


class VarUseError(DSLError, TypeError):
    """A variable was used as if it were its value."""


class VarAttributeError(VarUseError, AttributeError):
    """An attribute of the value was asked of the variable."""


class ForeignVarError(DSLError, ValueError):
    """A variable was passed to a program that it does not belong to."""


class ProgramEndedError(DSLError, RuntimeError):
    """A call was made in a program whose scope has been left."""


class PromptError(DSLError, ValueError):
    """A body built something that is not a prompt, or damaged a hole in one."""


class OutputError(DSLError, ValueError):
    """What the model wrote, or a body returned, is not of the declared type.

    Attributes:
        reason: What is wrong, as the model is told when it is asked again: without the place in the workflow.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        self.reason = reason or message
        super().__init__(message)


class SchemaViolation(OutputError):
    """What the model wrote does not satisfy a keyword of the schema that decoding cannot enforce.

    Attributes:
        keyword: Of JSON Schema, such as `uniqueItems`.
        path: JSON pointer to the offending part of the output; empty for the whole.
        value: That part.
    """

    def __init__(self, message: str, reason: str, keyword: str, path: str, value: object) -> None:
        self.keyword = keyword
        self.path = path
        self.value = value
        super().__init__(message, reason)


class OutputCutOff(OutputError):
    """A typed output, or a tool call, reached `max_tokens` before it was complete. It is not asked for again."""


class ToolError(DSLError):
    """A tool raised an error, which is the cause of this one."""


class ToolArgumentsError(ToolError, ValueError):
    """Arguments that do not fit the tool. The text is readable by a model."""


class ToolTimeout(ToolError, TimeoutError):
    """A tool took longer than its `timeout`."""


class StepLimitError(DSLError):
    """An agent loop reached its limit of turns without an answer."""


class CompileError(DSLError):
    """A workflow has no graph before it runs: it used a value on the way."""


class BudgetExceeded(DSLError):
    """The program, or one around it, has used up its `budget_tokens`."""


class NodeCancelled(DSLError):
    """The value will not come: its call was cancelled."""


class ProgramCancelled(NodeCancelled):
    """The value will not come: its program ended first."""


class DeadlineExceeded(NodeCancelled, TimeoutError):
    """The program's deadline passed."""


class FailureStep(NamedTuple):
    """One node on the way of a failure."""

    name: str
    location: Location

    def __str__(self) -> str:
        return f"{self.name} ({self.location})"


class NodeFailed(DSLError):
    """A value that depends on a node that failed.

    Attributes:
        node: The node whose value was awaited.
        cause: The error of the node where the failure began; also `__cause__`.
        path: From `node` to the node where the failure began.
    """

    def __init__(self, node: Node, cause: BaseException, path: tuple[FailureStep, ...]) -> None:
        self.node = node
        self.cause = cause
        self.path = path
        self.__cause__ = cause
        way = "".join(f"\n  needs {step}" for step in path[1:])
        super().__init__(f"{path[0]} has no value{way}\n  which failed: {type(cause).__name__}: {cause}")
