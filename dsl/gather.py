"""`gather`: many variables as one."""

from __future__ import annotations

from typing import Any, TypeVar, overload

from treadle.dsl.node import Node
from treadle.dsl.program import program_for
from treadle.dsl.var import Var

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


@overload
def gather(a: Var[A], /) -> Var[tuple[A]]: ...
@overload
def gather(a: Var[A], b: Var[B], /) -> Var[tuple[A, B]]: ...
@overload
def gather(a: Var[A], b: Var[B], c: Var[C], /) -> Var[tuple[A, B, C]]: ...
@overload
def gather(a: Var[A], b: Var[B], c: Var[C], d: Var[D], /) -> Var[tuple[A, B, C, D]]: ...
@overload
def gather(*variables: Var[A]) -> Var[tuple[A, ...]]: ...
def gather(*variables: Var[Any]) -> Var[Any]:
    """Joins variables into one, whose value is the tuple of their values; it fails as soon as one of them does.

    ::

        weather, news = await gather(forecast(city), headlines(city))
    """
    program = program_for("gather", variables)
    node = Node(program, "gather", "gather", variables)
    program.declare(node)
    waiting = len(variables)

    def count(var: Var[Any]) -> None:
        nonlocal waiting
        waiting -= 1
        if var.error is not None:
            node.output.fail(var.error)
        elif waiting == 0:
            node.output.resolve(tuple(each.value for each in variables))

    for var in variables:
        var.on_done(count)
    if not variables:
        node.output.resolve(())
    return node.output
