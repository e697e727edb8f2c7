"""Where the values of a configuration come from: flags, then TREADLE_* variables, then a TOML file, then defaults.

The fields of `ServerConfig` are the one table of what there is. `max_body_bytes` is the flag `--max-body-bytes`, the
variable `TREADLE_MAX_BODY_BYTES` and the key `max_body_bytes`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import tomllib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.server.config import ServerConfig

Value: TypeAlias = str | int | float | bool | tuple[str, ...] | None
PREFIX = "TREADLE_"
TRUTHS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
NOT_SETTINGS = frozenset({"key", "url"})
"""What clients of a server take from the environment, perhaps the same one."""
CLOSE = 0.75
"""How much two names must have in common for one to be taken for a slip of the other."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of `ServerConfig`, seen from outside."""

    name: str
    kind: type[str] | type[int] | type[float] | type[bool] | type[tuple[str, ...]]
    is_optional: bool
    choices: tuple[str, ...]
    default: Value
    group: str
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    def from_text(self, text: str) -> Value:
        """The value that a flag or a variable spells. Raises `ValueError`, which says what it should be."""
        if self.kind is bool:
            if text.lower() not in TRUTHS:
                raise ValueError("neither true nor false")
            return TRUTHS[text.lower()]
        if self.kind is tuple:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        try:
            value: Value = text if self.kind is str else self.kind(text)
        except ValueError:
            raise ValueError("not a whole number" if self.kind is int else "not a number") from None
        return self._checked(value)

    def from_toml(self, value: object) -> Value:
        """The value of a key in a file. Raises `ValueError` for another type."""
        if self.kind is tuple and isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind or not isinstance(value, str | int | float):
            raise ValueError(f"not {NOUNS[self.kind]}")
        return self._checked(value)

    def _checked(self, value: Value) -> Value:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("not a finite number")
        if self.choices and value not in self.choices:
            raise ValueError(f"not one of {', '.join(self.choices)}")
        return value


NOUNS: Mapping[object, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of strings",
}


def settings() -> tuple[Setting, ...]:
    """Everything that can be set, in the order in which it is shown."""
    hints = get_type_hints(ServerConfig)
    found = []
    for known in fields(ServerConfig):
        kind, is_optional, choices = _taken_apart(hints[known.name])
        default: Any = known.default
        group, about = known.metadata["group"], known.metadata["help"]
        found.append(Setting(known.name, kind, is_optional, choices, default, group, about))
    return tuple(found)


def _taken_apart(hint: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """The type, whether it may be unset, and the words it is limited to."""
    if get_origin(hint) in (Union, types.UnionType):
        kind, _, choices = _taken_apart(next(part for part in get_args(hint) if part is not type(None)))
        return kind, True, choices
    if get_origin(hint) is Literal:
        return str, False, get_args(hint)
    return get_origin(hint) or hint, False, ()


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each setting, `--config` and `--print-config`. A flag that is not given leaves no attribute."""
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="TOML file of settings")
    parser.add_argument("--print-config", action="store_true", help="print all settings and where they are from, end")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in settings():
        if setting.name == "model":
            about = f"{setting.help} (default: {setting.default})"
            parser.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=about)
            continue
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        _add_flag(groups[setting.group], setting)


def _add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    shown = ", ".join(setting.default) if isinstance(setting.default, tuple) else setting.default
    about = setting.help if shown in (None, "") else f"{setting.help} (default: {shown})"
    common: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS, "help": about.replace("%", "%%")}
    if setting.kind is bool:
        group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, **common)
        return
    metavar = "|".join(setting.choices) or {int: "N", float: "SECONDS", tuple: "A,B"}.get(setting.kind, "TEXT")
    group.add_argument(setting.flag, type=_parser_of(setting), metavar=metavar, **common)


def _parser_of(setting: Setting) -> Callable[[str], Value]:
    def parse(text: str) -> Value:
        try:
            return setting.from_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return parse


@dataclass(frozen=True, slots=True)
class Found:
    """A configuration, and for each setting that is not a default where its value is from."""

    config: ServerConfig
    sources: Mapping[str, str]


def read_settings(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Found:
    """Puts the sources together: `flags` as `add_settings` parsed them, variables, and the file that they name.

    Raises `InvalidRequestError` for a name that is unknown, with the nearest one, and for a value that cannot be.
    """
    known = {setting.name: setting for setting in settings()}
    values: dict[str, Value] = {}
    sources: dict[str, str] = {}

    def take(found: Mapping[str, Value], source: Callable[[Setting], str]) -> None:
        values.update(found)
        sources.update({name: source(known[name]) for name in found})

    path = flags.get("config") or environment.get(f"{PREFIX}CONFIG")
    if path:
        take(_from_file(str(path), known), lambda setting: str(path))
    take(_from_environment(environment, known), lambda setting: setting.variable)
    take({name: flags[name] for name in known if name in flags}, lambda setting: setting.flag)
    return Found(ServerConfig(**values), sources)  # type: ignore[arg-type]


def _from_file(path: str, known: Mapping[str, Setting]) -> dict[str, Value]:
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"{path}: the settings cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidRequestError(f"{path}: this is not TOML: {error}") from None
    found = {}
    for key, value in table.items():
        if key not in known:
            raise InvalidRequestError(f"{path}: there is no setting {key!r}{_nearest(key, known)}")
        try:
            found[key] = known[key].from_toml(value)
        except ValueError as error:
            raise InvalidRequestError(f"{path}: {key} is {value!r}: {error}") from None
    return found


def _from_environment(environment: Mapping[str, str], known: Mapping[str, Setting]) -> dict[str, Value]:
    """Variables of ours. An empty one counts as unset; one that is nearly a setting is a slip, others are not ours."""
    found = {}
    for variable, text in environment.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or name in NOT_SETTINGS or not text:
            continue
        if name in known:
            try:
                found[name] = known[name].from_text(text)
            except ValueError as error:
                raise InvalidRequestError(f"{variable} is {text!r}: {error}") from None
        elif near := difflib.get_close_matches(name, known, 1, CLOSE):
            raise InvalidRequestError(f"there is no setting {variable}; did you mean {known[near[0]].variable}?")
    return found


def _nearest(name: str, known: Mapping[str, Setting]) -> str:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1, 0)
    return f"; did you mean {near[0]!r}?" if near else ""


def print_settings(found: Found) -> str:
    """All settings as TOML that can be read back, each with where it is from."""
    lines: list[str] = []
    group = ""
    for setting in settings():
        if setting.group != group:
            group = setting.group
            lines += ["", f"# {group}"] if lines else [f"# {group}"]
        value = getattr(found.config, setting.name)
        source = found.sources.get(setting.name, "default")
        text = f"# {setting.name} is unset" if value is None else f"{setting.name} = {_toml(value)}"
        lines.append(f"{text}  # {source}")
    return "\n".join(lines) + "\n"


def _toml(value: Value) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(json.dumps(part, ensure_ascii=False) for part in value) + "]"
    return json.dumps(value, ensure_ascii=False)
