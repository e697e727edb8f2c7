"""Annotations of a function as types, also of one that is defined inside another."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from treadle.dsl.location import caller_frame


def local_names(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The names around a function that is being decorated; none at the top of a module."""
    return caller_frame().f_locals if "<locals>" in function.__qualname__ else {}


def type_hints(function: Callable[..., Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """The types of the parameters and of the result. Raises `NameError` for one that is not defined yet."""
    return typing.get_type_hints(function, localns=dict(names) or None, include_extras=True)


def bind(name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> inspect.BoundArguments:
    """Arguments by parameter. Raises `TypeError`, as calling the function would."""
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}(): {error}") from None
