"""A Jinja sandbox that stops. Jinja's own keeps a template away from Python's internals, but not from running for
ever or filling memory, and a chat template comes with a downloaded model.

Whatever a template does repeatedly happens in a loop, a macro or a call; what it makes large, it makes with an
operator, a filter or a call. Each of these is made to pay from a budget for one rendering:

    {% for x in xs %}  ->  {% for x in xs %}{% do pay() %}        as is every macro's body and loop's condition
    a ~ b              ->  concat(a, b)                           pays for the length of the result
    a + b, a * b, a % b, a ** b                                   refused before the result would be too large
    f(x), x | f                                                   pays for the length of the result
    {{ x }}                                                       pays for the length of what is written

Each payment also looks at the clock. Only functions, filters and methods whose cost is in proportion to what they are
given are there at all.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from treadle.runtime.errors import InvalidRequestError, UnsupportedModelError

MAX_SOURCE_CHARS = 1_000_000
MAX_CHARS = 4_000_000
"""The longest prompt, and the longest value that a template may make on the way to it."""
MAX_SECONDS = 5.0

_WORK_PER_CHAR = 16
_WORK_PER_STEP = 64
_MAX_RANGE = 100_000
_MAX_INT_BITS = 128
_MAX_INDENT = 16
# fmt: off
_FILTERS = frozenset((
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape",
    "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
))
_STR_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper",
    "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
))
# fmt: on
_NESTED_FORMAT = re.compile(r"\{[^{}]*:[^{}]*\{|%[-+ #0]*\*")
_PADDED_DATE = re.compile(r"%[-_0^#]*\d")
_ADVICE = "Use another template or another model."


class _OutOfBounds(Exception):
    """A template has used up what one rendering may cost."""


class _Refusal(Exception):
    """The template called `raise_exception`."""


class _Budget(threading.local):
    """What the rendering in this thread may still cost: characters of work, and time."""

    work = 0
    deadline = 0.0

    def start(self) -> None:
        self.work = MAX_CHARS * _WORK_PER_CHAR
        self.deadline = time.monotonic() + MAX_SECONDS

    def pay(self, amount: int) -> None:
        self.work -= amount + _WORK_PER_STEP
        if self.work < 0:
            raise _OutOfBounds("does too much work")
        if time.monotonic() > self.deadline:
            raise _OutOfBounds(f"runs for more than {MAX_SECONDS:g} seconds")

    def pay_to_make(self, size: int) -> None:
        """Pays for a value of `size` characters or elements before it is made."""
        if size > MAX_CHARS:
            raise _OutOfBounds(f"makes a text of more than {MAX_CHARS} characters")
        self.pay(max(size, 0))

    def pay_for(self, value: object) -> None:
        """Pays for a value that has been made. A container is paid for with all that is in it, as often as it is in
        it: otherwise lists of twice the same list would double for free."""
        if isinstance(value, str):
            self.pay(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.pay(self.weigh(value)[0])
        else:
            self.pay(0)

    def weigh(self, value: object) -> tuple[int, int, int]:
        """The elements in `value`, the characters in its text, and how deep it nests."""
        elements = chars = depth = 0
        stack: list[tuple[object, int]] = [(value, 1)]
        while stack:
            item, level = stack.pop()
            elements += 1
            depth = max(depth, level)
            if isinstance(item, str):
                chars += len(item)
            elif isinstance(item, (list, tuple)):
                self.pay(len(item))
                stack += [(child, level + 1) for child in item]
            elif isinstance(item, dict):
                self.pay(2 * len(item))
                stack += [(child, level + 1) for pair in item.items() for child in pair]
            elif isinstance(item, Namespace):
                raise _OutOfBounds("writes a namespace as text")
        return elements, chars + 8 * elements, depth


class BoundedTemplate:
    """A compiled template. `render` may run in several threads at once.

    Raises `UnsupportedModelError`, with the line, if `source` is not a template.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise UnsupportedModelError(
                f"the chat template is {len(source)} characters long; at most {MAX_SOURCE_CHARS} are allowed. {_ADVICE}"
            )
        self._environment = _Environment()
        try:
            tree = _Payments().visit(self._environment.parse(source))
            code = self._environment.compile(tree)
            self._template = self._environment.template_class.from_code(
                self._environment, code, self._environment.make_globals(None)
            )
        except TemplateSyntaxError as error:
            raise UnsupportedModelError(
                f"the chat template has an error in line {error.lineno}: {error.message} {_ADVICE}"
            ) from error
        except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise UnsupportedModelError(f"the chat template cannot be compiled: {error}. {_ADVICE}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text that the template writes. Raises `InvalidRequestError` if it calls `raise_exception`, and
        `UnsupportedModelError` if it fails or would cost too much."""
        budget = self._environment.budget
        budget.start()
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(variables):
                length += len(part)
                if length > MAX_CHARS:
                    raise _OutOfBounds(f"makes a text of more than {MAX_CHARS} characters")
                parts.append(part)
        except _Refusal as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}") from None
        except (_OutOfBounds, MemoryError, RecursionError) as error:
            reason = str(error) if isinstance(error, _OutOfBounds) else "nests too deeply or needs too much memory"
            raise UnsupportedModelError(f"the chat template was stopped because it {reason}. {_ADVICE}") from error
        # A template is a program of its own: anything may go wrong in it, and nothing of it is ours.
        except Exception as error:
            raise UnsupportedModelError(
                f"the chat template failed on these messages: {type(error).__name__}: {error}. Check that the messages "
                "have the fields that it expects, or use another template."
            ) from error
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox that pays. See the top of this file."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        self.budget = _Budget()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            # Constants folded at compile time would be made outside the budget.
            optimized=False,
            extensions=[loopcontrols, _GenerationTag],
            finalize=self._write,
        )
        self.globals = {
            "range": self._range,
            "namespace": Namespace,
            "dict": dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        own = {"tojson": self._to_json, "join": self._join, "replace": self._replace, "indent": self._indent}
        self.filters = {name: self._paid(self.filters[name]) for name in _FILTERS}
        self.filters |= own | {"format": self._format}

    def turn(self, literal_chars: int) -> bool:
        """One turn of a loop or call of a macro, whose body holds this much literal text."""
        self.budget.pay(literal_chars)
        return True

    def built(self, value: Any) -> Any:
        """A list, tuple or dict that the template wrote out."""
        self.budget.pay_for(value)
        return value

    def concat(self, *values: Any) -> str:
        """The `~` operator."""
        return "".join(self._texts(values))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STR_METHODS
        if isinstance(obj, (int, float, bytes)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self.budget.pay_to_make(max(_repeated(left, right), _repeated(right, left)))
        elif operator == "+":
            self.budget.pay_to_make(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            self._pay_to_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "**" and (abs(right) > 64 or abs(left) > 2**32):
            raise _OutOfBounds("raises a number to a large power")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > _MAX_INT_BITS:
            raise _OutOfBounds(f"makes a number of more than {_MAX_INT_BITS} bits")
        self.budget.pay_for(result)
        return result

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # Jinja wraps str.format, whose string is then found one level deeper.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            return self._call_str_method(owner, function, args, kwargs)
        result = super().call(context, function, *args, **kwargs)
        self.budget.pay_for(result)
        return result

    def _call_str_method(self, text: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = method.__name__
        if name == "replace":
            return self._replace(text, *args, **kwargs)
        if name == "join":
            return self._join(args[0], text)
        if name == "format":
            self._pay_to_format(text, (*args, *kwargs.values()))
        else:
            self.budget.pay(len(text))
        result = method(*args, **kwargs)
        self.budget.pay_for(result)
        return result

    @pass_context
    def _write(self, context: Context, value: Any) -> Any:
        """What `{{ }}` writes. It takes the context, though it has no use for it, because Jinja writes what depends on
        it at run time only."""
        self.budget.pay_to_make(len(value) if isinstance(value, str) else self._chars(value))
        return value

    def _paid(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if isinstance(value, (str, list, tuple, dict)):
                    self.budget.pay(self._chars(value) if function.__name__ == "soft_str" else len(value))
            result = function(*args, **kwargs)
            self.budget.pay_for(result)
            return result

        return paid

    def _chars(self, value: object) -> int:
        return self.budget.weigh(value)[1]

    def _texts(self, values: Sequence[Any]) -> list[str]:
        self.budget.pay_to_make(sum(len(v) if isinstance(v, str) else self._chars(v) for v in values))
        return [str(value) for value in values]

    def _range(self, *bounds: int) -> range:
        values = range(*bounds)
        if len(values) > _MAX_RANGE:
            raise _OutOfBounds(f"counts further than {_MAX_RANGE}")
        return values

    def _join(self, values: Any, separator: str = "", attribute: str | int | None = None) -> str:
        items = list(values)
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        self.budget.pay_to_make(len(str(separator)) * len(items))
        return str(separator).join(self._texts(items))

    def _replace(self, text: Any, old: str, new: str, count: int | None = -1) -> str:
        text, old, new = str(text), str(old), str(new)
        limit = -1 if count is None else count
        self.budget.pay_to_make(len(text) + text.count(old) * len(new))
        return text.replace(old, new, limit)

    def _indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        margin = width if isinstance(width, str) else " " * min(width, MAX_CHARS)
        lines = str(text).splitlines(keepends=True)
        self.budget.pay_to_make(len(text) + len(lines) * len(margin))
        return "".join(
            margin + line if (i > 0 or first) and (blank or line.strip()) else line for i, line in enumerate(lines)
        )

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As in transformers: letters as they are, and nothing escaped for HTML."""
        if (indent or 0) > _MAX_INDENT or any(len(separator) > _MAX_INDENT for separator in separators or ()):
            raise _OutOfBounds("indents JSON by too much")
        elements, chars, depth = self.budget.weigh(value)
        self.budget.pay_to_make(chars + elements * depth * (indent or 0))
        result = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        self.budget.pay_to_make(len(result))
        return result

    def _format(self, text: str, *args: Any, **kwargs: Any) -> str:
        self._pay_to_format(text, (*args, *kwargs.values()))
        return str(text % (kwargs or args))

    def _pay_to_format(self, text: str, values: Sequence[Any]) -> None:
        if _NESTED_FORMAT.search(text):
            raise _OutOfBounds("formats text with a computed width")
        widths = sum(int(digits[-9:]) for digits in re.findall(r"\d+", text))
        fields = text.count("%") + text.count("{")
        largest = max((self._chars(value) for value in values), default=0)
        self.budget.pay_to_make(len(text) + widths + fields * largest)


class _Payments(NodeTransformer):
    """Rewrites a template so that it pays: see the top of this file."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._paying(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._paying(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._paying(node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _call("built", [self.generic_visit(node)], node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _call("built", [self.generic_visit(node)], node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        visited = self.generic_visit(node)
        return _call("built", [visited], node) if node.ctx == "load" else visited

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concat", node.nodes, node)

    def _paying(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        literal_chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        turn = _call("turn", [nodes.Const(literal_chars)], node)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return node


def _call(method: str, arguments: Sequence[nodes.Node], place: nodes.Node) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method, lineno=place.lineno)
    return nodes.Call(function, list(arguments), [], None, None, lineno=place.lineno)


class _GenerationTag(Extension):
    """`{% generation %}`, with which some templates mark what the assistant said. It changes nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _length(value: object) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _repeated(value: object, times: object) -> int:
    return _length(value) * times if isinstance(times, int) else 0


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 200 or _PADDED_DATE.search(pattern):
        raise _OutOfBounds("formats a date with a width")
    return datetime.now().strftime(pattern)
