"""Pauses that are drawn at random in place of the recorded ones of tools."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from treadle.scheduler.simulator.traces import PauseTable
from treadle.scheduler.simulator.workload import CallSpec, ProgramSpec

Draw = Callable[[random.Random, str], float]
Redraw = Callable[[ProgramSpec, int], ProgramSpec]
"""A program, and a seed, to the same program with other pauses."""

FORMS = "recorded, lognormal:SIGMA, bimodal:SHORT:LONG[:SHARE] or a file of quantiles"


def redraw(text: str, programs: Sequence[ProgramSpec]) -> Redraw:
    """What replaces the pauses for tools of these programs.

    - `recorded`: nothing is replaced.
    - `lognormal:SIGMA`: independent of what was recorded and of the tool. The mean of the recorded pauses is kept, so
      that programs are away for as long in all; their median becomes exp(-sigma^2 / 2) of it.
    - `bimodal:SHORT:LONG[:SHARE]`: so many seconds each. SHARE of them are long, from 0 to 1; without it, as many as
      keep the mean of the recorded pauses.
    - a file: `PauseTable`, by name of the tool; a tool that the table does not have is any of its tools.

    A pause depends on the seed, the program and its place in the program; so policies are given the same.

    Raises:
        ValueError: the text is none of these, or the recorded pauses leave no choice.
    """
    kind, *arguments = text.split(":")
    if text == "recorded":
        return lambda program, seed: program
    if kind == "lognormal":
        return _by(_lognormal(_numbers(text, arguments, 1, 1)[0], mean_pause(programs)))
    if kind == "bimodal":
        short, long, *share = _numbers(text, arguments, 2, 3)
        return _by(_bimodal(short, long, *share, mean_s=mean_pause(programs)))
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"no pauses are called {text!r}, and there is no such file; give {FORMS}")
    table = PauseTable.read(path)
    return _by(lambda rng, tool: table.sample(rng, tool if tool in table.tools else ""))


def mean_pause(programs: Sequence[ProgramSpec]) -> float:
    """Mean of the seconds that programs wait for a tool, 0 if they never do."""
    pauses = [call.pause_s for program in programs for call in program.calls if call.pause_kind == "tool"]
    return fmean(pauses) if pauses else 0.0


def _by(draw: Draw) -> Redraw:
    def program_with_other_pauses(program: ProgramSpec, seed: int) -> ProgramSpec:
        rng = random.Random(f"pauses of {program.id}, seed {seed}")
        return replace(program, calls=tuple(_drawn(call, draw, rng) for call in program.calls))

    return program_with_other_pauses


def _drawn(call: CallSpec, draw: Draw, rng: random.Random) -> CallSpec:
    return replace(call, pause_s=draw(rng, call.tool)) if call.pause_kind == "tool" else call


def _lognormal(sigma: float, mean_s: float) -> Draw:
    if mean_s <= 0:
        raise ValueError("the trace has no pauses for tools whose mean a log-normal distribution could keep")
    centre = math.log(mean_s) - sigma**2 / 2
    return lambda rng, tool: rng.lognormvariate(centre, sigma)


def _bimodal(short: float, long: float, share: float | None = None, *, mean_s: float) -> Draw:
    if not short < long:
        raise ValueError(f"of bimodal pauses the first is the shorter one, not {short} and {long}")
    if share is None:
        share = (mean_s - short) / (long - short)
        if not 0 <= share <= 1:
            text = f"the mean pause of the trace is {mean_s:.3g} s, not between {short} and {long}"
            raise ValueError(f"{text}; give the share of long ones: bimodal:{short}:{long}:0.5")
    if share > 1:
        raise ValueError(f"the share of long pauses is from 0 to 1, not {share}")
    return lambda rng, tool: long if rng.random() < share else short


def _numbers(text: str, words: Sequence[str], least: int, most: int) -> list[float]:
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not least <= len(numbers) <= most or not all(0 <= number < math.inf for number in numbers):
        raise ValueError(f"{text!r} is no distribution of pauses; give {FORMS}")
    return numbers
