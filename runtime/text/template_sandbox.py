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
from treadle.runtime.text.template_budget import MAX_CHARS, Budget, OutOfBounds

MAX_SOURCE_CHARS = 200_000
_MAX_RANGE = 100_000
_MAX_INT_BITS = 128
_MAX_INDENT = 16
# fmt: off
_LIST_FILTERS = frozenset((
    "abs", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last", "length", "list",
    "map", "max", "min", "reject", "rejectattr", "reverse", "round", "select", "selectattr", "sort", "unique",
))
_TEXT_FILTERS = frozenset((
    "capitalize", "e", "escape", "forceescape", "lower", "safe", "string", "title", "trim", "upper",
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


class _Refusal(Exception):
    """The template called `raise_exception`."""


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
        """The text that the template writes. Raises `InvalidRequestError` if it calls `raise_exception`, fails on what
        it is given, or is given too much, and `UnsupportedModelError` if it costs too much by itself."""
        budget = self._environment.budget
        budget.start()
        parts: list[str] = []
        length = 0
        try:
            for part in self._template.generate(variables):
                length += len(part)
                if length > MAX_CHARS:
                    raise OutOfBounds(f"makes a text of more than {MAX_CHARS} characters")
                parts.append(part)
        except _Refusal as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {_shortened(error)}") from None
        except (OutOfBounds, MemoryError, RecursionError) as error:
            reason = str(error) if isinstance(error, OutOfBounds) else "nests too deeply or needs too much memory"
            if self._is_large(variables):
                raise InvalidRequestError(
                    f"the messages are too long: with them, the chat template {reason}."
                ) from error
            raise UnsupportedModelError(f"the chat template was stopped because it {reason}. {_ADVICE}") from error
        # A template is a program of its own: anything may go wrong in it, and nothing of it is ours.
        except Exception as error:
            raise InvalidRequestError(
                f"the chat template failed on these messages ({type(error).__name__}: {_shortened(error)}). Check that "
                "they have the fields that it expects, or use another template."
            ) from error
        return "".join(parts)

    def _is_large(self, variables: Mapping[str, Any]) -> bool:
        """Whether what was given, rather than what the template made of it, explains a rendering out of bounds."""
        self._environment.budget.start()
        try:
            return self._environment.budget.weigh(dict(variables))[1] > MAX_CHARS // 4
        except OutOfBounds:
            return True


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox that pays. See the top of this file."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self) -> None:
        self.budget = Budget()
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
            "raise_exception": self._raise_exception,
            "strftime_now": _strftime_now,
        }
        own = {"tojson": self._to_json, "join": self._join, "replace": self._replace, "indent": self._indent}
        self.filters = (
            {name: self._paid(self.filters[name]) for name in _LIST_FILTERS}
            | {name: self._paid_text(self.filters[name]) for name in _TEXT_FILTERS}
            | own
            | {"format": self._format}
        )

    def pay_turn(self, literal_chars: int) -> bool:
        """One turn of a loop or call of a macro, whose body holds this much literal text."""
        self.budget.pay(literal_chars)
        return True

    def pay_built(self, value: Any) -> Any:
        """A list, tuple or dict that the template wrote out, or a slice."""
        self.budget.pay_for(value)
        return value

    def pay_concat(self, *values: Any) -> str:
        """The `~` operator."""
        texts = [self._text(value) for value in values]
        self.budget.pay_to_make(sum(map(len, texts)))
        return "".join(texts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STR_METHODS
        if isinstance(obj, (int, float, bytes)):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        # Jinja would write such an argument out in its complaint.
        if isinstance(argument, (list, tuple, dict)):
            raise OutOfBounds("takes a list for an index")
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            self.budget.pay_to_make(max(_repeated(left, right), _repeated(right, left)))
        elif operator == "+":
            self.budget.pay_to_make(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            self._pay_to_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "**" and (abs(right) > 64 or abs(left) > 2**32):
            raise OutOfBounds("raises a number to a large power")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > _MAX_INT_BITS:
            raise OutOfBounds(f"makes a number of more than {_MAX_INT_BITS} bits")
        self.budget.pay_for(result)
        return result

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        # Jinja wraps str.format, whose string is then found one level deeper.
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(owner, str):
            # Within loops and blocks, Jinja adds these to every call, and takes them out in `Context.call`.
            given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            return self._call_str_method(owner, function, args, given)
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
            self.budget.pay(sum(_length(value) for value in args))
            result = function(*args, **kwargs)
            self.budget.pay_for(result)
            return result

        return paid

    def _paid_text(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def paid(value: Any, *args: Any, **kwargs: Any) -> Any:
            result = function(value if isinstance(value, str) else self._text(value), *args, **kwargs)
            self.budget.pay_for(result)
            return result

        return paid

    def _text(self, value: Any) -> str:
        self.budget.pay_to_make(len(value) if isinstance(value, str) else self._chars(value))
        return str(value)

    def _chars(self, value: object) -> int:
        return self.budget.weigh(value)[1]

    def _raise_exception(self, message: object) -> NoReturn:
        raise _Refusal(self._text(message))

    def _range(self, *bounds: int) -> range:
        values = range(*bounds)
        if len(values) > _MAX_RANGE:
            raise OutOfBounds(f"counts further than {_MAX_RANGE}")
        return values

    def _join(self, values: Any, separator: Any = "", attribute: str | int | None = None) -> str:
        items = list(values)
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        texts = [self._text(item) for item in items]
        glue = self._text(separator)
        self.budget.pay_to_make(sum(map(len, texts)) + len(glue) * len(texts))
        return glue.join(texts)

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = -1) -> str:
        text, old, new = self._text(value), self._text(old), self._text(new)
        self.budget.pay_to_make(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        margin = width if isinstance(width, str) else " " * min(width, MAX_CHARS)
        text = self._text(value)
        lines = text.splitlines(keepends=True)
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
            raise OutOfBounds("indents JSON by too much")
        elements, chars, depth = self.budget.weigh(value)
        self.budget.pay_to_make(chars + elements * depth * (indent or 0))
        result = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        self.budget.pay_to_make(len(result))
        return result

    def _format(self, text: str, *args: Any, **kwargs: Any) -> str:
        self._pay_to_format(text, (*args, *kwargs.values()))
        formatted: str = text % (kwargs or args)
        return formatted

    def _pay_to_format(self, text: str, values: Sequence[Any]) -> None:
        if _NESTED_FORMAT.search(text):
            raise OutOfBounds("formats text with a computed width")
        widths = sum(int(digits[:9]) for digits in re.findall(r"\d+", text))
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
        return _call("pay_built", [self.generic_visit(node)], node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _call("pay_built", [self.generic_visit(node)], node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        visited = self.generic_visit(node)
        return _call("pay_built", [visited], node) if node.ctx == "load" else visited

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        visited = self.generic_visit(node)
        return _call("pay_built", [visited], node) if isinstance(node.arg, nodes.Slice) else visited

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("pay_concat", node.nodes, node)

    def _paying(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        literal_chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        turn = _call("pay_turn", [nodes.Const(literal_chars)], node)
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


def _shortened(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 1000 else text[:1000] + "..."


def _length(value: object) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _repeated(value: object, times: object) -> int:
    return _length(value) * times if isinstance(times, int) else 0


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 200 or _PADDED_DATE.search(pattern):
        raise OutOfBounds("formats a date with a width")
    return datetime.now().strftime(pattern)
