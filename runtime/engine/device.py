"""Where an engine computes: its operations, whether work is done when a call returns, and how to wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from treadle.kernels.native import Native
from treadle.kernels.ops import REFERENCE, Ops, native_ops
from treadle.runtime.engine.config import DeviceName
from treadle.runtime.errors import InvalidRequestError


class Event(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Blocks until the device has come there."""
        ...


class Device(Protocol):
    """A place where tensors live and steps run."""

    torch_device: torch.device
    ops: Ops
    runs_ahead: bool
    """Whether the device works on its own after a launch, so that launching ahead hides work of the host."""

    def record(self) -> Event:
        """Marks the end of the work launched so far."""
        ...

    def send(self, values: Tensor) -> Tensor:
        """A small tensor of the host on the device, without waiting for it."""
        ...

    def fetch(self, values: Tensor) -> Tensor:
        """A copy in the host's memory, which is there once an event recorded after this has come."""
        ...

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device's copies can reach."""
        ...

    def copying(self) -> AbstractContextManager[None]:
        """Copies launched within run beside what is computed, after all work launched before."""
        ...

    def join_copies(self) -> None:
        """Work launched from now on begins after the copies launched so far."""
        ...


class Done:
    """An event of a device that has always finished."""

    def wait(self) -> None:
        return


class CPU:
    """The processor: an operation is done when it returns."""

    torch_device = torch.device("cpu")
    runs_ahead = False

    def __init__(self, ops: Ops = REFERENCE) -> None:
        self.ops = ops

    def record(self) -> Event:
        return Done()

    def send(self, values: Tensor) -> Tensor:
        return values

    def fetch(self, values: Tensor) -> Tensor:
        return values

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def copying(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join_copies(self) -> None:
        return


class CUDA:
    """An NVIDIA GPU: the host launches work in a stream and goes on; copies to and from its memory have their own."""

    torch_device = torch.device("cuda")
    runs_ahead = True

    def __init__(self) -> None:
        from treadle.kernels.gpu import TRITON

        self.ops = TRITON
        self._copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self) -> Event:
        return _CudaEvent()

    def send(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self.torch_device, non_blocking=True)

    def fetch(self, values: Tensor) -> Tensor:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    @contextmanager
    def copying(self) -> Iterator[None]:
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            yield

    def join_copies(self) -> None:
        torch.cuda.current_stream().wait_stream(self._copies)


class _CudaEvent:
    """A point in the current stream. Waiting sleeps, so that it takes no core from the threads that tokenize."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


def open_device(name: DeviceName, native: Native | None = None) -> Device:
    """The device of a name; a CPU computes with `native` operations, where there are some.

    Raises `InvalidRequestError` if this machine, or this build of torch, has no such device.
    """
    if name == "cpu":
        return CPU(REFERENCE if native is None else native_ops(native))
    if torch.version.cuda is None:
        raise InvalidRequestError(
            "device is 'cuda', but this torch was built without CUDA; install a build that has it, or use device='cpu'"
        )
    if not torch.cuda.is_available():
        raise InvalidRequestError(
            f"device is 'cuda', but torch, built for CUDA {torch.version.cuda}, finds no GPU that it can use; see what "
            "`nvidia-smi` says of the driver, or use device='cpu'"
        )
    return CUDA()
