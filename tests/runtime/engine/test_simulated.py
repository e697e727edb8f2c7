"""The simulator tells the truth: a live engine on the same clock, given the same programs, decides the same."""

from __future__ import annotations

import random
from functools import cache

import pytest
from live.programs import Live, Script, Turn, workload
from support.engines import checkpoint, with_seed

from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import EngineConfig
from treadle.scheduler.simulator.clock import Setup, Simulation
from treadle.scheduler.simulator.hardware import CopyCost, Hardware, StepCost, pairs

PAGE = 4
# Powers of two: sums of such times are exact, so a duration is the same whichever way it was added up.
MACHINE = Hardware(
    "a machine of round numbers",
    kv_bytes_per_token=1024,
    step_tokens=24,
    rows=6,
    step=StepCost(2**-7, 2**-12, 2**-18, 2**-20),
    copy=CopyCost(2.0**22, 2.0**22, 2**-13),
    source="made up",
    validated=False,
)
POLICIES = {
    "requests in order": ("fcfs", "lru", "greedy"),
    "programs in order": ("program-fcfs", "lru", "greedy"),
    "working sets": ("program-fcfs", "treadle", "treadle"),
    "attained service": ("plas", "lru", "greedy"),
    "critical service": ("atlas", "lru", "greedy"),
    "fixed time": ("program-fcfs", "fixed:1", "greedy"),
    "continuum": ("continuum", "continuum", "greedy"),
    "pause and resume": ("program-fcfs", "lru", "pause-resume"),
    "additive increase": ("program-fcfs", "lru", "aimd"),
}


class Clock:
    """A time that steps advance by what they would cost on some hardware."""

    def __init__(self, hardware):
        self.now = 0.0
        self._hardware = hardware

    def __call__(self):
        return self.now

    def wait(self, until):
        self.now = until

    def drive(self, engine):
        """Lets every step that an engine carries out take its time."""
        write = engine.runner.state.write

        def costly(plan):
            write(plan)
            self.now += max(self._computing(plan), self._copying(plan))

        engine.runner.state.write = costly

    def _computing(self, plan):
        long_rows = [row for row in plan.rows if row.count > 1]
        context = sum(row.end for row in plan.rows if row.count == 1)
        num_pairs = sum(pairs(row.start, row.count) for row in long_rows)
        return self._hardware.step.seconds(plan.num_tokens, num_pairs, context) if plan.rows else 0.0

    def _copying(self, plan):
        copy, size = self._hardware.copy, PAGE * self._hardware.kv_bytes_per_token
        saving = copy.fixed_s + len(plan.saves) * size / copy.bytes_per_s_to_host if plan.saves else 0.0
        loading = copy.fixed_s + len(plan.loads) * size / copy.bytes_per_s_to_device if plan.loads else 0.0
        return max(saving, loading)


@cache
def scripts():
    """Sixteen conversations that begin alike, of two to five turns, with pauses from nothing to two seconds."""
    draw = random.Random(7)
    common = tuple(draw.randrange(500) for _ in range(10))
    found = []
    for number in range(16):
        turns = []
        for index in range(draw.randrange(2, 6)):
            new = tuple(draw.randrange(500) for _ in range(draw.randrange(4, 20)))
            pause = draw.choice([0, 16, 32, 64, 512]) / 256 if index else 0.0
            turns.append(Turn(new if index else common + new, draw.randrange(4, 12), pause))
        found.append(Script(f"p{number}", tuple(turns), number / 64, f"kind {number % 2}"))
    return found


@cache
def outputs():
    """What the engine generates for each turn when nothing else is there, cut so that its last token is new in it."""
    engine = build_engine(checkpoint("tiny-llama"), None, EngineConfig(dtype="float32", num_pages=256, page_size=PAGE))
    found = {}
    for script in scripts():
        ids = []
        for index, turn in enumerate(script.turns):
            ids += turn.new_ids
            alone = Script(f"{script.id}/{index}/alone", (Turn(tuple(ids), turn.output_tokens),))
            clock = Clock(MACHINE)
            (progress,) = Live(engine, [alone], clock, clock.wait, 1, lambda key: noisy(key[0].partition("/")[0])).run()
            output = progress.outputs[0]
            while output[-1] in output[:-1]:
                output.pop()
            found[script.id, index] = output
            ids += output
    return found


def noisy(name, *stop):
    return with_seed(sum(name.encode()), temperature=1.0, stop_token_ids=stop)


@pytest.mark.parametrize("host_pages", [0, 40])
@pytest.mark.parametrize("concurrency", [8, None])
@pytest.mark.parametrize("policy", POLICIES)
def test_live_engine_and_simulator_decide_the_same(policy, concurrency, host_pages):
    order, retention, admission = POLICIES[policy]
    pool = 44 * PAGE
    setup = Setup(MACHINE, pool, host_pages * PAGE, order, retention, admission, concurrency, page_tokens=PAGE, leap=1)
    simulation = Simulation(workload(scripts(), outputs()), setup)
    clock = Clock(MACHINE)
    engine = build_engine(
        checkpoint("tiny-llama"),
        None,
        EngineConfig(
            dtype="float32",
            num_pages=pool // PAGE,
            host_pages=host_pages,
            page_size=PAGE,
            num_slots=MACHINE.rows,
            max_step_tokens=MACHINE.step_tokens,
            max_context=pool,
            order=order,
            retention=retention,
            admission=admission,
            costs=simulation.scheduler.config.costs,
        ),
        clock,
    )
    clock.drive(engine)
    live = Live(
        engine,
        scripts(),
        clock,
        clock.wait,
        concurrency,
        lambda key: noisy(key[0], outputs()[key][-1]),
    )

    simulated = simulation.run()
    done = live.run(engine.scheduler.check_integrity)

    assert list(engine.scheduler.decisions) == list(simulation.scheduler.decisions)
    assert [progress.script.id for progress in done] == [record.id for record in simulated.programs]
    assert [progress.ended for progress in done] == [record.ended for record in simulated.programs]
    for progress in done:
        assert progress.outputs == [outputs()[progress.script.id, index] for index in range(len(progress.outputs))]
    assert simulation.scheduler.memory.num_evicted > 0, "memory was never short"
    assert bool(simulated.loaded) == bool(host_pages)
