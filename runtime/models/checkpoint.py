"""The one form in which every weight format reaches the decoder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from treadle.runtime.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from treadle.kernels.codes import Int4Matrix, Int8Matrix


class Checkpoint(Protocol):
    """An opened model: its shape, and its tensors by their Hugging Face names.

    Opening reads headers only. `tensor` reads one tensor, dequantised if need be, in the layout that Hugging Face
    uses (`[out_features, in_features]`, rotary halves split, not interleaved); `codes` reads one as it is stored.
    """

    path: Path | None
    config: ModelConfig

    def names(self) -> Collection[str]:
        """Every tensor that `tensor` can give, such as `model.layers.0.self_attn.q_proj.weight`."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in a floating-point type. Raises `CorruptModelError` if it is absent or damaged."""
        ...

    def codes(self, name: str) -> Int4Matrix | Int8Matrix | None:
        """The codes of a matrix that is stored in some, which stand for what `tensor` gives; None for any other."""
        ...
