"""Whether an engine computes with the operations of `native.c`."""

from __future__ import annotations

import torch

from treadle.kernels.native import MOST_HEAD_DIM, Native, NativeUnavailable, load_native
from treadle.kernels.native_linear import fits_native
from treadle.runtime.config import c_compiler, cache_dir
from treadle.runtime.engine.config import EngineConfig, torch_dtype
from treadle.runtime.models.config import ModelConfig
from treadle.runtime.models.layout import tensor_shapes


def find_native(model: ModelConfig, config: EngineConfig) -> Native | None:
    """The operations, if the configuration wants them and they are there for this machine, type and model.

    The first time they are built, which takes some seconds.
    """
    wanted = config.native and config.device == "cpu" and torch_dtype(config.dtype) == torch.bfloat16
    if not wanted or not _fits(model):
        return None
    try:
        return load_native(cache_dir(), c_compiler())
    except NativeUnavailable:
        return None


def is_native(model: ModelConfig, config: EngineConfig) -> bool:
    """Whether `find_native` finds something."""
    return find_native(model, config) is not None


def _fits(model: ModelConfig) -> bool:
    """Whether every matrix has a product, and heads and vectors can be computed in whole lanes."""
    matrices = [shape for _, shape in tensor_shapes(model) if len(shape) == 2]
    return (
        all(fits_native(out_features, in_features) for out_features, in_features in matrices)
        and model.head_dim % 32 == 0
        and model.head_dim <= MOST_HEAD_DIM
    )
