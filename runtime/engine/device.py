"""What differs between devices in the step loop: whether work is done when a call returns, and how to wait for it."""

from __future__ import annotations

from typing import Protocol

import torch


class Event(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Blocks until the device has come there."""
        ...


class Device(Protocol):
    """A place where tensors live and steps run."""

    torch_device: torch.device
    runs_ahead: bool
    """Whether the device works on its own after a launch, so that launching ahead hides work of the host."""

    def record(self) -> Event:
        """Marks the end of the work launched so far."""
        ...


class Done:
    """An event of a device that has always finished."""

    def wait(self) -> None:
        return


class CPU:
    """The processor: an operation is done when it returns."""

    torch_device = torch.device("cpu")
    runs_ahead = False

    def record(self) -> Event:
        return Done()
