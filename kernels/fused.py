"""What a decoder does between its matrix products, each as one kernel: norms, rotation with the cache write, SwiGLU.

Results are those of `reference` with arithmetic in float32 throughout; what is stored is rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.kernels.reference import CODE_LIMITS

SWIGLU_BLOCK = 1024
"""Elements that a program of `swiglu` computes."""
NO_SCALE = tl.constexpr(1e-30)
"""Scales below this count as zero, and so do the numbers under them: dividing by them would overflow."""


@triton.jit
def rms_norm_kernel(
    normed: tl.tensor,
    total: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One program for each row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    inside = n < N
    value = tl.load(x + row * x_stride + n, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * N + n, rounded, mask=inside)
        # The next layer adds to the rounded sum: what is normed is the same number.
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / N + eps)
    value = value * scale * tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * N + n, value.to(normed.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension of `[T, N]`; rows may lie apart."""
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(normed, normed, x, x, weight, eps, add=False)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of `[T, N]` sums `x + residual` rounded to the type of `x`, and the sums."""
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_rms_norm(normed, total, x, residual, weight, eps, add=True)
    return normed, total


def _launch_rms_norm(
    normed: Tensor, total: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, add: bool
) -> None:
    rows, size = x.shape
    assert x.stride(1) == residual.stride(1) == 1 and weight.is_contiguous()
    block = triton.next_power_of_2(size)
    rms_norm_kernel[(rows,)](
        normed,
        total,
        x,
        residual,
        weight,
        x.stride(0),
        residual.stride(0),
        eps,
        ADD=add,
        N=size,
        BLOCK_N=block,
        num_warps=norm_warps(block),
    )


def norm_warps(block: int) -> int:
    """Warps for a row: 16 elements a thread, at least one warp."""
    return min(max(block // 512, 1), 16)


@triton.jit
def _rotated(
    heads: tl.tensor,
    weight: tl.tensor,
    inside: tl.tensor,
    angles: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The two halves of heads whose rows begin at `heads`, normed and turned by the angles at `cos` and `sin`."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, BLOCK_HALF)[None, :]
    left = tl.load(heads + d, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(heads + d + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / D + eps)[:, None]
        left *= scale * tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32)
        right *= scale * tl.load(weight + d + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    cos_left = tl.load(cos + angles + d, mask=d < HALF, other=0.0).to(tl.float32)
    cos_right = tl.load(cos + angles + d + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    sin_left = tl.load(sin + angles + d, mask=d < HALF, other=0.0).to(tl.float32)
    sin_right = tl.load(sin + angles + d + HALF, mask=d < HALF, other=0.0).to(tl.float32)
    return left * cos_left - right * sin_left, right * cos_right + left * sin_right


@triton.jit
def _coded(value: tl.tensor, scale: tl.tensor, LIMIT: tl.constexpr, INTEGER: tl.constexpr) -> tl.tensor:
    """Numbers as multiples of a scale, in the range of the codes; zeros where the scale is zero or not finite."""
    usable = (scale >= NO_SCALE) & (scale < float("inf"))
    value = tl.where(usable, value / tl.where(usable, scale, 1.0), 0.0)
    if INTEGER:
        value = tl.floor(value + 0.5)
    # A scale that was rounded down would push the largest over the limit.
    return tl.minimum(tl.maximum(value, -LIMIT), LIMIT)


@triton.jit
def _write(
    left: tl.tensor,
    right: tl.tensor,
    cache: tl.tensor,
    scales: tl.tensor,
    head: tl.tensor,
    LIMIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Stores the two halves of a head as head number `head` of a cache, `[1, BLOCK_HALF]` each."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, BLOCK_HALF)[None, :]
    if LIMIT > 0:
        INTEGER: tl.constexpr = cache.dtype.element_ty == tl.int8
        largest = tl.maximum(tl.max(tl.abs(left)), tl.max(tl.abs(right)))
        # A maximum passes over NaN.
        sound = tl.sum((tl.abs(left) < float("inf")).to(tl.int32)) + tl.sum((tl.abs(right) < float("inf")).to(tl.int32))
        scale = tl.where(sound == 2 * BLOCK_HALF, largest / LIMIT, float("nan")).to(scales.dtype.element_ty)
        tl.store(scales + head, scale)
        left = _coded(left, scale.to(tl.float32), LIMIT, INTEGER)
        right = _coded(right, scale.to(tl.float32), LIMIT, INTEGER)
    cells = cache + head * D + d
    tl.store(cells, left.to(cache.dtype.element_ty), mask=d < HALF)
    tl.store(cells + HALF, right.to(cache.dtype.element_ty), mask=d < HALF)


@triton.jit
def norm_rope_write_kernel(
    q: tl.tensor,
    qkv: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    cache: tl.tensor,
    scales: tl.tensor,
    places: tl.tensor,
    qkv_stride: tl.tensor,
    side_stride: tl.tensor,
    scales_side_stride: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    LIMIT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """One program for each token and kv head: the queries of its group, its key and its value.

    ::

        qkv of a token   | q 0 .. G-1 | q G .. 2G-1 | ... | k 0 | k 1 | ... | v 0 | v 1 | ...
        program 1                       ^^^^^^^^^^^               ^^^                ^^^
    """
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    HEADS: tl.constexpr = KV_HEADS * GROUP
    d = tl.arange(0, BLOCK_HALF)[None, :]
    member = tl.arange(0, BLOCK_GROUP)[:, None]
    heads = qkv + token * qkv_stride

    inside = (member < GROUP) & (d < HALF)
    group = (kv_head * GROUP + member) * D
    q_left, q_right = _rotated(heads + group, q_norm, inside, token * D, cos, sin, eps, NORM, D, BLOCK_HALF)
    turned = q + token * (HEADS * D) + group + d
    tl.store(turned, q_left.to(q.dtype.element_ty), mask=inside)
    tl.store(turned + HALF, q_right.to(q.dtype.element_ty), mask=inside)

    place = tl.load(places + token).to(tl.int64)
    if place >= 0:
        # NOTE: in 64 bits, because a cache has more than 2^31 elements.
        head = place * KV_HEADS + kv_head
        key = heads + (HEADS + kv_head) * D
        k_left, k_right = _rotated(key, k_norm, d < HALF, token * D, cos, sin, eps, NORM, D, BLOCK_HALF)
        _write(k_left, k_right, cache, scales, head, LIMIT, D, BLOCK_HALF)
        value = heads + (HEADS + KV_HEADS + kv_head) * D + d
        v_left = tl.load(value, mask=d < HALF, other=0.0).to(tl.float32)
        v_right = tl.load(value + HALF, mask=d < HALF, other=0.0).to(tl.float32)
        _write(v_left, v_right, cache + side_stride, scales + scales_side_stride, head, LIMIT, D, BLOCK_HALF)


def norm_rope_write(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    places: Tensor,
    scales: Tensor | None = None,
) -> Tensor:
    """Norms and turns the heads of new tokens, and writes keys and values to the cache.

    Args:
        qkv: `[T, H + 2 * K, D]`, queries first, then keys, then values.
        q_norm, k_norm: `[D]` each, for models that norm each head; both or neither.
        cos, sin: `[T, 1, D]`.
        cache: Of the layer, `[2, P, S, K, D]`; with scales it is int8 or float8 e4m3.
        places: int64 `[T]`, `page * S + offset`; -1 for padding, of which nothing is written.
        scales: Of the cache, `[2, P, S, K]`, float32 or float16. Keys or values that are not finite get a scale that is
            not finite either.

    Returns:
        Queries `[T, H, D]`.
    """
    tokens, all_heads, size = qkv.shape
    kv_heads = cache.shape[3]
    heads = all_heads - 2 * kv_heads
    assert qkv.stride()[1:] == (size, 1) and cos.is_contiguous() and sin.is_contiguous()
    assert cache.is_contiguous() and (scales is None or scales.is_contiguous())
    q = torch.empty(tokens, heads, size, dtype=qkv.dtype, device=qkv.device)
    stored = cache if scales is None else scales
    norms = (q_norm, k_norm) if q_norm is not None and k_norm is not None else (qkv, qkv)
    norm_rope_write_kernel[(tokens, kv_heads)](
        q,
        qkv,
        *norms,
        cos,
        sin,
        cache,
        stored,
        places,
        qkv.stride(0),
        cache.stride(0),
        stored.stride(0),
        eps,
        NORM=q_norm is not None,
        LIMIT=0.0 if scales is None else CODE_LIMITS[cache.dtype],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        BLOCK_GROUP=triton.next_power_of_2(heads // kv_heads),
        D=size,
        BLOCK_HALF=triton.next_power_of_2(size // 2),
        num_warps=1,
    )
    return q


@triton.jit
def swiglu_kernel(
    out: tl.tensor, gate_up: tl.tensor, stride: tl.tensor, F: tl.constexpr, BLOCK_F: tl.constexpr
) -> None:
    """One program for each row and block of its outputs."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate = tl.load(gate_up + row * stride + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + f, mask=f < F, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * F + f, value.to(out.dtype.element_ty), mask=f < F)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[T, 2 * F]`, gate first; rows may lie apart."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(SWIGLU_BLOCK, triton.next_power_of_2(size))
    swiglu_kernel[(rows, triton.cdiv(size, block))](out, gate_up, gate_up.stride(0), F=size, BLOCK_F=block, num_warps=4)
    return out
