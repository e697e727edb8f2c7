"""Traces of agents and servers, public ones and recordings of our own, read into workloads."""

from treadle.scheduler.simulator.traces.files import TraceError
from treadle.scheduler.simulator.traces.reader import read
from treadle.scheduler.simulator.traces.timing import ArrivalRate, PauseTable, Quantiles, read_rates

__all__ = ["ArrivalRate", "PauseTable", "Quantiles", "TraceError", "read", "read_rates"]
