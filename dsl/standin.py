"""What takes the place of a value while a workflow is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from treadle.dsl.errors import CompileError
from treadle.dsl.location import Location, caller

if TYPE_CHECKING:
    from treadle.dsl.var import Var


class StandIn:
    """An awaited value that there is not. It may be passed on and returned; any other use is a `CompileError`."""

    __slots__ = ("awaited", "var")

    def __init__(self, var: Var[Any], awaited: Location) -> None:
        self.var = var
        self.awaited = awaited

    def refuse(self, used: str) -> NoReturn:
        raise CompileError(
            f"{caller()}: the value of {self.var.node}, awaited at {self.awaited}, is {used}: "
            "what comes next depends on it, so that this workflow has no graph before it runs"
        )

    def __repr__(self) -> str:
        return f"<the value of {self.var.node}>"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse(f"asked for its .{name}")

    def __bool__(self) -> bool:
        self.refuse("tested")

    def __iter__(self) -> NoReturn:
        self.refuse("iterated over")

    def __str__(self) -> str:
        self.refuse("formatted")

    def __format__(self, spec: str) -> str:
        self.refuse("formatted")

    def __len__(self) -> int:
        self.refuse("measured")

    def __getitem__(self, key: object) -> NoReturn:
        self.refuse("indexed")

    def __contains__(self, item: object) -> bool:
        self.refuse("searched")

    def __hash__(self) -> int:
        self.refuse("hashed")

    def __eq__(self, other: object) -> bool:
        self.refuse("compared")

    def _operated(self, *others: object) -> NoReturn:
        self.refuse("calculated with or compared")

    __lt__ = __le__ = __gt__ = __ge__ = _operated
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _operated
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __neg__ = __abs__ = _operated
    __int__ = __float__ = __index__ = __round__ = __call__ = _operated
