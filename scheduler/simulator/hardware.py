"""What a step and a copy cost on some hardware with some model: the simulator's clock."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any


def pairs(start: int, count: int) -> int:
    """Pairs of a new token and a token before it, for `count` tokens computed from position `start` on."""
    return count * start + count * (count - 1) // 2


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step, linear in what it computes.

    Attributes:
        fixed_s: a step with nothing in it: weights read once, launches, sampling.
        per_token_s: each token computed, those of decoding rows included.
        per_pair_s: each pair of a prompt token and a token before it (`pairs`): the attention of prefill.
        per_context_token_s: each token of context of a decoding row: its keys and values are read.
    """

    fixed_s: float
    per_token_s: float
    per_pair_s: float
    per_context_token_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            _require(field.name, getattr(self, field.name), zero=True)
        _require("fixed_s", self.fixed_s)

    def seconds(self, new_tokens: int, pairs: int, decode_context: int) -> float:
        """Seconds of a step.

        Args:
            new_tokens: tokens computed by all rows, one for each decoding row.
            pairs: over the rows that compute prompt tokens, new tokens times their context.
            decode_context: sum of the contexts of the decoding rows, in tokens.
        """
        return (
            self.fixed_s
            + self.per_token_s * new_tokens
            + self.per_pair_s * pairs
            + self.per_context_token_s * decode_context
        )


@dataclass(frozen=True, slots=True)
class CopyCost:
    """Copies of KV between device and host memory: bytes per second each way, and seconds that any copy takes."""

    bytes_per_s_to_host: float
    bytes_per_s_to_device: float
    fixed_s: float

    def __post_init__(self) -> None:
        _require("bytes_per_s_to_host", self.bytes_per_s_to_host)
        _require("bytes_per_s_to_device", self.bytes_per_s_to_device)
        _require("fixed_s", self.fixed_s, zero=True)


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device with one model on it.

    Attributes:
        kv_bytes_per_token: bytes of keys and values of a token, all layers.
        step_tokens: most tokens that a step computes.
        rows: most calls in a step.
        source: where the numbers come from, and how far they may be trusted.
        validated: whether times computed from them were compared with times of a running server.
    """

    name: str
    kv_bytes_per_token: int
    step_tokens: int
    rows: int
    step: StepCost
    copy: CopyCost
    source: str
    validated: bool

    def __post_init__(self) -> None:
        for name in ("kv_bytes_per_token", "step_tokens", "rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
        for name in ("name", "source"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be a text that is not empty")
        if not isinstance(self.validated, bool):
            raise ValueError(f"validated must be true or false, not {self.validated!r}")


def names() -> tuple[str, ...]:
    """Names of the engines that `load` knows, sorted."""
    folder = resources.files(__package__ or "") / "engines"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


def load(name: str) -> Hardware:
    """The hardware of a name.

    Raises:
        ValueError: there is none of that name, or its file has a value that makes no sense.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise ValueError(f"no engine is called {name!r}; nearest: {', '.join(near)}")
    file = resources.files(__package__ or "") / "engines" / f"{name}.json"
    return parse(file.read_text(encoding="utf-8"), f"engines/{name}.json")


def parse(text: str, where: str) -> Hardware:
    """Hardware from JSON: an object with the fields of `Hardware`, all of them and no others.

    Raises:
        ValueError: the text is not that; the message begins with `where`.
    """
    try:
        data = json.loads(text)
        _expect(Hardware, data)
        _expect(StepCost, data["step"])
        _expect(CopyCost, data["copy"])
        data["step"], data["copy"] = StepCost(**data["step"]), CopyCost(**data["copy"])
        return Hardware(**data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def digest(hardware: Hardware) -> str:
    """Twelve hex digits that change when a number changes, or the code that turns the numbers into seconds."""
    numbers = json.dumps(asdict(hardware), sort_keys=True, separators=(",", ":"))
    code = Path(__file__).read_text(encoding="utf-8")
    return hashlib.sha256(f"{numbers}\n{code}".encode()).hexdigest()[:12]


def _expect(kind: type[Hardware | StepCost | CopyCost], data: object) -> None:
    expected = [field.name for field in fields(kind)]
    if not isinstance(data, Mapping) or sorted(map(str, data)) != sorted(expected):
        found = ", ".join(map(str, data)) if isinstance(data, Mapping) else repr(data)
        raise ValueError(f"{kind.__name__} needs exactly the fields {', '.join(expected)}; found {found}")


def _require(name: str, value: Any, *, zero: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be a finite number {'of at least' if zero else 'above'} 0, not {value!r}")
