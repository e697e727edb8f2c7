"""Programs under a virtual clock: what hardware costs, what programs do, and when they come."""

from treadle.scheduler.simulator.hardware import CopyCost, Hardware, StepCost
from treadle.scheduler.simulator.workload import Blocks, CallSpec, ProgramSpec, Workload

__all__ = ["Blocks", "CallSpec", "CopyCost", "Hardware", "ProgramSpec", "StepCost", "Workload"]
