"""The virtual clock: when calls begin and end, and what those who see the future are told."""

from treadle.scheduler.simulator.clock import Setup, Simulation
from treadle.scheduler.simulator.hardware import CopyCost, Hardware, StepCost
from treadle.scheduler.simulator.workload import Blocks, CallSpec, ProgramSpec, Workload

SIZE = 16
# A step takes a second, whatever is in it: calls beside each other do not slow each other down.
MACHINE = Hardware(
    "a second a step",
    kv_bytes_per_token=1,
    step_tokens=1024,
    rows=64,
    step=StepCost(1.0, 0.0, 0.0, 0.0),
    copy=CopyCost(1e9, 1e9, 0.0),
    source="made up",
    validated=False,
)


def call(number, pause_s=0.0, kind="tool", stream="main", tokens=SIZE, output=4):
    """A call of `output` seconds, whose prompt nothing else begins with unless it has the same number."""
    return CallSpec(stream, Blocks(((1000 * number, 8),)), tokens, output, pause_s, kind)


def simulation_of(*programs, stopwatch=lambda: 0.0, **setup):
    workload = Workload("w", SIZE, programs)
    return Simulation(workload, Setup(MACHINE, 1024, page_tokens=SIZE, **setup), stopwatch)


def test_who_sees_the_future_knows_when_a_conversation_goes_on_while_another_one_runs():
    told = {}

    def look():
        """Asks for the end of the first call's pause, at every plan."""
        books = simulation.scheduler.books
        if "p/0" in books.leases:
            told[simulation.now] = books.foresight.returns(books.leases["p/0"])
        return 0.0

    calls = (call(0), call(1, 20.0, stream="agent"), call(2, 30.0, stream="agent"), call(3, 50.0))
    simulation = simulation_of(ProgramSpec("p", "kind", 0.0, calls, "p"), stopwatch=look, clairvoyant=True, leap=1)
    simulation.run()
    # The first call ends at 4 s, and those of the agent run from 24 s to 28 s and from 58 s to 62 s.
    assert told[4.0] == 4 + 20 + 30 + 50
    assert told[25.0] == 25 + 30 + 50
    assert told[28.0] == 28 + 30 + 50
    assert told[62.0] == 62 + 50
