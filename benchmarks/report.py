"""How every benchmark prints: a table for people, or one JSON object a line with all that repeats the figure."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Parameter: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value, what it is, and under which parameters it was measured."""

    figure: str
    value: float
    unit: str
    parameters: dict[str, Parameter]


class Report:
    """Takes figures as they are measured. JSON lines are printed at once, the table at the end.

    `common` are the parameters of every figure; in the table they stand once, above it.
    """

    def __init__(self, common: dict[str, Parameter], *, as_json: bool) -> None:
        self._common = {**common, **machine()}
        self._as_json = as_json
        self._figures: list[Figure] = []

    def add(self, figure: str, value: float, unit: str, **parameters: Parameter) -> None:
        """Records one figure."""
        found = Figure(figure, value, unit, parameters)
        self._figures.append(found)
        if self._as_json:
            line = {"figure": figure, "value": round(value, 6), "unit": unit, **parameters, **self._common}
            print(json.dumps(line), flush=True)
        else:
            print(f"{figure} {_listed(parameters)}: {_shown(value)} {unit}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Prints the table, unless JSON lines were asked for."""
        if self._as_json:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table("figure", "parameters", box=box.SIMPLE_HEAD)
        table.add_column("value", justify="right")
        table.add_column("unit")
        for figure in self._figures:
            table.add_row(figure.figure, _listed(figure.parameters), _shown(figure.value), figure.unit)
        print(_listed(self._common))
        Console().print(table)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", action="store_true", help="print a JSON object a line")
    options.add_argument("--quick", action="store_true", help="small sizes and one repeat: does it run, not how fast")
    return options


def machine() -> dict[str, Parameter]:
    """The processor, the versions and the load before the benchmark that a figure depends on.

    The load average must be well below the number of cores: torch's threads spin while they wait for each other, so
    one other busy process can cost a factor of ten.
    """
    import torch

    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_name() -> str:
    """The processor's name and model number: virtual machines often hide the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']}, family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"


def _shown(value: float) -> str:
    """Four digits; of large numbers all, and a decimal."""
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _listed(parameters: dict[str, Parameter]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items())
