"""Programs like those of coding agents, the same for the same seed: for benchmarks without a recorded trace.

A program is one conversation. It begins with a long prompt, of which a part is the same for all, and goes on for some
turns, each adding the last answer and a tool's result. In between it waits for a tool: mostly for seconds, sometimes
for minutes.
"""

from __future__ import annotations

import math
import random

from treadle.scheduler.simulator.workload import Blocks, CallSpec, ProgramSpec, Workload

BLOCK_TOKENS = 64
SHARED_BLOCKS = 60
TOOLS = (("read", 0.3, 1.0), ("search", 2.0, 1.0), ("test", 20.0, 1.5))
"""Name, median of the seconds that it takes, and the standard deviation of their logarithm."""


def agents(count: int, seed: int = 0) -> Workload:
    """So many programs of 5 to 40 turns, with contexts that grow to some tens of thousands of tokens."""
    rng = random.Random(f"agents, seed {seed}")
    return Workload(f"generated, seed {seed}", BLOCK_TOKENS, tuple(_agent(index, rng) for index in range(count)))


def _agent(index: int, rng: random.Random) -> ProgramSpec:
    first_own = SHARED_BLOCKS + index * 4096
    num_blocks = SHARED_BLOCKS + rng.randint(40, 200)
    calls: list[CallSpec] = []
    for turn in range(rng.randint(5, 40)):
        output = rng.randint(30, 800)
        prompt = Blocks.from_runs([(0, SHARED_BLOCKS), (first_own, num_blocks - SHARED_BLOCKS)])
        tool, median, spread = rng.choice(TOOLS)
        pause = rng.lognormvariate(math.log(median), spread) if turn else 0.0
        kind = "tool" if turn else "none"
        calls.append(CallSpec("main", prompt, num_blocks * BLOCK_TOKENS, output, pause, kind, tool if turn else ""))
        num_blocks += -(-output // BLOCK_TOKENS) + rng.randint(1, 60)
    return ProgramSpec(f"agent {index}", "agent", 0.0, tuple(calls), "generated")
