"""Does the simulator tell the truth? The same programs on a live engine and in a simulation, under four policies.

    python benchmarks/simulator_truth.py --model smollm2 --engine cpu-smollm2 --threads 1 --clock cpu

The programs are conversations of a few turns with pauses of 0.2 to 2 seconds, on a pool too small for those that run
at once. Lengths and pauses are given, so that both have the same work; tokens are what the model says. Compared are
mean completion times, and their ratios between policies. Weights are in full: see `calibrate.py`. Without `--engine`
the model is calibrated first.

With `--clock cpu` a second is a second of the processor's work for this process, and pauses are skipped rather than
slept: other processes on the same cores then do not count. It is of use with one thread only.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from calibrate import hardware_of
from live.calibration import TIMERS, Timer, Work, fit, measure_copies, measure_steps
from live.programs import Live, Script, Turn, workload
from report import Parameter, Report, parser

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import DTYPES, EngineConfig, torch_dtype
from treadle.runtime.engine.engine import Engine
from treadle.runtime.loading import open_model
from treadle.runtime.models.checkpoint import Checkpoint
from treadle.scheduler import Event, SamplingParams, StepPlan
from treadle.scheduler.simulator import Hardware, hardware
from treadle.scheduler.simulator.clock import Setup, Simulation

POLICIES = (
    ("fcfs", "lru", "greedy"),
    ("program-fcfs", "lru", "greedy"),
    ("program-fcfs", "treadle", "treadle"),
    ("plas", "lru", "greedy"),
)
PAGE = 16
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Load:
    """How many programs, how many at once, tokens of the pool, and how long what they say is."""

    programs: int
    at_once: int
    pool: int
    first: tuple[int, int]
    later: tuple[int, int]
    output: tuple[int, int]
    pauses: tuple[float, float]


FULL = Load(24, 8, 5120, (300, 800), (40, 240), (4, 16), (0.2, 2.0))
QUICK = Load(6, 3, 320, (40, 80), (8, 24), (2, 5), (0.002, 0.02))


@dataclass(slots=True)
class Seen:
    """What became of programs on a live engine: seconds of each, the share of prompt tokens that were cached, and the
    seconds of all steps, as they were and as the costs say."""

    seconds: list[float]
    cached: float
    in_steps: float
    in_steps_by_costs: float


class Clock:
    """Seconds of a timer. Waiting is sleeping, or, where the timer counts only work, turning the clock on."""

    def __init__(self, timer: Timer, *, sleeps: bool) -> None:
        self._timer = timer
        self._sleeps = sleeps
        self._skipped = -timer()

    def __call__(self) -> float:
        return self._timer() + self._skipped

    def wait(self, until: float) -> None:
        seconds = until - self()
        if self._sleeps:
            time.sleep(max(0.0, seconds))
        else:
            self._skipped += max(0.0, seconds)


def make_scripts(load: Load, vocab_size: int, seed: int) -> list[Script]:
    """Conversations of three to seven turns that share nothing; pauses are spread evenly on a logarithmic scale."""
    draw = random.Random(seed)
    low, high = load.pauses
    scripts = []
    for number in range(load.programs):
        turns = []
        for index in range(draw.randint(3, 7)):
            count = draw.randint(*(load.later if index else load.first))
            pause = low * (high / low) ** draw.random() if index else 0.0
            ids = tuple(draw.randrange(vocab_size) for _ in range(count))
            turns.append(Turn(ids, draw.randint(*load.output), pause))
        scripts.append(Script(f"program-{number}", tuple(turns)))
    return scripts


def simulate(scripts: Sequence[Script], setup: Setup) -> tuple[Simulation, list[float]]:
    """Seconds that each program takes in a simulation."""
    fresh = itertools.count(1 << 20)
    outputs = {
        (script.id, index): array("i", [next(fresh)]) * turn.output_tokens
        for script in scripts
        for index, turn in enumerate(script.turns)
    }
    simulation = Simulation(workload(scripts, outputs), setup)
    return simulation, [record.ended - record.began for record in simulation.run().programs]


def run_live(
    checkpoint: Checkpoint, scripts: Sequence[Script], simulation: Simulation, args: argparse.Namespace
) -> Seen:
    """Runs programs on a live engine set up like a simulation."""
    config = simulation.scheduler.config
    clock = Clock(TIMERS[args.clock], sleeps=args.clock == "wall")
    engine = build_engine(
        checkpoint,
        None,
        EngineConfig(
            dtype=args.dtype,
            weights="full",
            native=False,
            num_threads=args.threads,
            num_pages=config.num_pages,
            page_size=config.page_size,
            num_slots=config.num_slots,
            max_step_tokens=config.max_step_tokens,
            order=config.order,
            retention=config.retention,
            admission=config.admission,
            costs=config.costs,
        ),
        clock,
    )
    warm_up = Script("warm-up", (Turn(tuple(range(64)), 4),))
    Live(engine, [warm_up], clock, clock.wait, 1, lambda key: GREEDY).run()
    live = Live(engine, scripts, clock, clock.wait, simulation.setup.concurrency, lambda key: GREEDY)
    plans, seconds = watch(engine, clock)
    done = live.run()
    cached = sum(program.cached for program in done) / sum(program.prompt_tokens for program in done)
    step = simulation.setup.hardware.step
    by_costs = sum(step.seconds(work.new_tokens, work.pairs, work.context) for work in map(Work.of, plans))
    return Seen([program.ended - program.began for program in done], cached, sum(seconds), by_costs)


def watch(engine: Engine, clock: Clock) -> tuple[list[StepPlan], list[float]]:
    """The plans that an engine carries out from now on, and the seconds of its steps."""
    plans: list[StepPlan] = []
    seconds: list[float] = []
    write, step = engine.runner.state.write, engine.step

    def remember(plan: StepPlan) -> None:
        plans.append(plan)
        write(plan)

    def timed() -> list[Event] | None:
        began = clock()
        events = step()
        seconds.append(clock() - began)
        return events

    engine.runner.state.write = remember  # type: ignore[method-assign]
    engine.step = timed  # type: ignore[method-assign]
    return plans, seconds


def costs(checkpoint: Checkpoint, args: argparse.Namespace) -> Hardware:
    """Those of the named engine, or of this one, measured now."""
    if args.engine is not None:
        return hardware.load(args.engine)
    engine = build_engine(
        checkpoint, None, EngineConfig(dtype=args.dtype, weights="full", native=False, num_threads=args.threads)
    )
    timer = TIMERS[args.clock]
    found = fit(list(measure_steps(engine, checkpoint.config.vocab_size, timer, quick=args.quick)))
    copies = measure_copies(engine, timer, quick=args.quick)
    return hardware_of(engine, "here", found, copies, "measured just before")


def compare(args: argparse.Namespace) -> None:
    """Runs every policy live and simulated, and prints both."""
    checkpoint, _ = open_model(args.model, pull=True)
    load = QUICK if args.quick else FULL
    machine = replace(costs(checkpoint, args), rows=load.at_once, step_tokens=256)
    common: dict[str, Parameter] = {
        "model": args.model,
        "dtype": str(torch_dtype(args.dtype)).removeprefix("torch."),
        "threads": args.threads or torch.get_num_threads(),
        "clock": args.clock,
        "engine": machine.name,
        "batch": load.at_once,
        "new_tokens": load.output[1],
        "programs": load.programs,
        "pool": load.pool,
    }
    report = Report(common, as_json=args.json)
    for seed in range(args.seed, args.seed + args.seeds):
        scripts = make_scripts(load, checkpoint.config.vocab_size, seed)
        means: dict[str, tuple[float, float]] = {}
        for order, retention, admission in POLICIES:
            setup = Setup(machine, load.pool, 0, order, retention, admission, load.at_once, page_tokens=PAGE, leap=1)
            simulation, simulated = simulate(scripts, setup)
            live = run_live(checkpoint, scripts, simulation, args)
            means[setup.policy] = statistics.mean(live.seconds), statistics.mean(simulated)
            here, there = means[setup.policy]
            seen: dict[str, Parameter] = {"policy": setup.policy, "seed": seed, "simulated": round(there, 4)}
            outcome = simulation.outcome
            seen |= {"hit_rate": round(live.cached, 3), "simulated_hit_rate": round(outcome.cached / outcome.prompt, 3)}
            seen |= {"error_of_costs": round(live.in_steps_by_costs / live.in_steps - 1, 4)}
            report.add("completion_mean", here, "s", **seen, error=round(there / here - 1, 4))
        for one, other in itertools.combinations(means, 2):
            ratio, simulated_ratio = (means[other][place] / means[one][place] for place in (0, 1))
            pair: dict[str, Parameter] = {"policy": other, "to": one, "seed": seed}
            error = round(simulated_ratio / ratio - 1, 4)
            report.add("completion_ratio", ratio, "x", **pair, simulated=round(simulated_ratio, 4), error=error)
    report.finish()


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2", help="name, path or random:SHAPE (default: smollm2)")
    options.add_argument("--dtype", choices=DTYPES, default="auto", help="element type (default: auto)")
    options.add_argument("--threads", type=int, help="threads for tensor operations (default: torch's)")
    options.add_argument("--clock", choices=tuple(TIMERS), default="wall", help="see above (default: wall)")
    options.add_argument("--engine", choices=hardware.names(), help="costs to simulate with (default: measured first)")
    options.add_argument("--seed", type=int, default=0, help="of the first draw (default: 0)")
    options.add_argument("--seeds", type=int, default=1, help="draw programs so many times (default: 1)")
    compare(options.parse_args())


if __name__ == "__main__":
    main()
