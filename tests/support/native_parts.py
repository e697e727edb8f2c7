"""Parts of the operation for all layers, called one by one."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch

from treadle.kernels.native import Contexts


def pointer(tensor):
    return c_void_p(None if tensor is None else tensor.data_ptr())


def rms_norm(native, x, weight, eps):
    """As `reference.rms_norm`."""
    out = torch.empty_like(x)
    assert native.library.treadle_norm(x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), *x.shape, eps)
    return out


def norm_rope_write(native, qkv, q_norm, k_norm, eps, cos, sin, cache, places):
    """As `reference.norm_rope_write`."""
    kv_heads, size = cache.shape[3:]
    heads = qkv.shape[1] - 2 * kv_heads
    queries = qkv.new_empty(len(qkv), heads, size)
    tensors = cache[0], cache[1], places, queries
    assert native.library.treadle_norm_rope_write(
        *map(pointer, (qkv, q_norm, k_norm)),
        c_float(eps),
        *map(pointer, (cos, sin, *tensors)),
        *map(c_int64, (len(qkv), heads, kv_heads, size)),
    )
    return queries


def attention(native, q, cache, page_table, runs, tasks, window):
    """Attention of `[T, H, D]` queries to contexts, as `Contexts.of` takes them."""
    out = torch.empty_like(q)
    contexts = Contexts.of(cache, q.shape[1], page_table, runs, tasks, window)
    assert native.library.treadle_attention(ctypes.byref(contexts), *map(pointer, (q, cache[0], cache[1], out)))
    return out
