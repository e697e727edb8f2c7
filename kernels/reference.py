"""The tensor operations of a decoder in plain torch: the oracle of every faster kernel, and the CPU path.

Shapes: T tokens of a step, H query heads, K key/value heads (H = K * G), D head size, P pages of S tokens. A place is
`page * S + offset`.

In no kernel may anything but a row's own context reach its output: elsewhere in a cache there may be anything, and a
mask does not stop NaN, which survives being multiplied by zero.

A cache is in the type of the model, or quantised: int8 or float8 e4m3 codes, which scales `[2, P, S, K]` multiply, one
for each token, side and key/value head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CODE_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest code of each type that a cache can be quantised to."""
NO_SCALE = 1e-30
"""Scales below this count as zero: dividing by them would overflow."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, summed in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual`, and that sum."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `[T, heads, D]` by `[T, 1, D]` angles; the two halves of a head are the two components."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return torch.addcmul(x * cos, turned, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[T, 2 * F]`, gate first."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def write_kv(cache: Tensor, keys: Tensor, values: Tensor, places: Tensor) -> None:
    """Stores `[T, K, D]` keys and values in a cache of `[2, P, S, K, D]` at `[T]` places."""
    flat = cache.view(2, -1, *cache.shape[3:])
    flat[0].index_copy_(0, places, keys)
    flat[1].index_copy_(0, places, values)


def quantize_kv(x: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes `[T, K, D]` of keys or values, and their scales `[T, K]`.

    A head that is not finite gets a scale that is not finite either. What is below the smallest scale becomes zero.
    """
    limit = CODE_LIMITS[dtype]
    x = x.float()
    scales = (x.abs().amax(-1) / limit).to(scale_dtype)
    # Divided by what is stored, so that rounding the scale costs nothing.
    divisors = scales.float()[..., None]
    multiples = torch.where(divisors.isfinite() & (divisors >= NO_SCALE), x / divisors, 0.0)
    if dtype == torch.int8:
        multiples = (multiples + 0.5).floor()
    return multiples.clamp(-limit, limit).to(dtype), scales


def dequantize_kv(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 numbers that codes `[..., D]` with scales `[...]` stand for."""
    return codes.float() * scales.float()[..., None]


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
        cache: Of the layer, `[2, P, S, K, D]`; with scales it is quantised.
        places: `[T]`. Where a step has padding, a kernel writes nothing for a place of -1.
        scales: Of the cache, `[2, P, S, K]`, float32 or float16.

    Returns:
        Queries `[T, H, D]`.
    """
    kv_heads = cache.shape[3]
    heads = qkv.shape[1] - 2 * kv_heads
    qk, values = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
    if q_norm is not None and k_norm is not None:
        qk = torch.cat((rms_norm(qk[:, :heads], q_norm, eps), rms_norm(qk[:, heads:], k_norm, eps)), 1)
    qk = apply_rope(qk, cos, sin)
    if scales is None:
        write_kv(cache, qk[:, heads:], values, places)
        return qk[:, :heads]
    for side, x in enumerate((qk[:, heads:], values)):
        codes, scale = quantize_kv(x, cache.dtype, scales.dtype)
        # NOTE: as bytes, because torch has no index operations on float8.
        cache[side].view(torch.uint8).flatten(0, 1).index_copy_(0, places, codes.view(torch.uint8))
        scales[side].flatten(0, 1).index_copy_(0, places, scale)
    return qk[:, :heads]


def copy_pages(source: Tensor, target: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copies pages in all layers of `[layers, 2, P, S, K, D]`, from one cache to another or within one.

    Reads every source before it writes. The two caches may differ in P.
    """
    target[:, :, targets] = source[:, :, sources]


def decode_attention(q: Tensor, cache: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
    """One query token per row against its paged context.

    Args:
        q: `[B, H, D]`.
        cache: Keys and values of the layer, `[2, P, S, K, D]`.
        places: `[B, N]`, where each row's context is; a shorter one is padded with any places of its own.
        mask: `[B, 1, 1, N]`, minus infinity where a row must not look; None if every row sees everything.

    Returns:
        `[B, H, D]`.
    """
    rows, heads, size = q.shape
    kv_heads = cache.shape[3]
    keys, values = _gather(cache, places)
    # The G query heads that share a key/value head become G query tokens, so that keys are not repeated.
    grouped = q.view(rows, kv_heads, heads // kv_heads, size)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.reshape(rows, heads, size)


def shared_decode_attention(q: Tensor, cache: Tensor, shared: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
    """As `decode_attention`, for rows whose contexts begin alike: that part is read once (cascade attention).

    Each part gives a mean of values and the logarithm of the sum of its weights; by those the two are merged exactly.

    Args:
        q: `[B, H, D]`.
        cache: Keys and values of the layer, `[2, P, S, K, D]`.
        shared: `[M]`, where the common part is.
        places, mask: `[B, N]` and `[B, 1, 1, N]`: the rest of each context, as in `decode_attention`.

    Returns:
        `[B, H, D]`.
    """
    rows, heads, size = q.shape
    kv_heads = cache.shape[3]
    grouped = q.view(rows, kv_heads, heads // kv_heads, size)
    together = grouped.transpose(0, 1).reshape(1, kv_heads, -1, size)
    common, common_lse = _attend(together, *_gather(cache, shared[None]), None)
    own, own_lse = _attend(grouped, *_gather(cache, places), mask)
    common = common.view(kv_heads, rows, -1, size).transpose(0, 1)
    common_lse = common_lse.view(kv_heads, rows, -1).transpose(0, 1)
    weight = torch.sigmoid(common_lse - own_lse).to(q.dtype)[..., None]
    return torch.lerp(own, common, weight).reshape(rows, heads, size)


def prefill_attention(q: Tensor, cache: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
    """The `[T, H, D]` queries of one row's last T tokens against its paged context.

    A token that is not finite may spoil those before it too.

    Args:
        places: `[N]`, where the row's context is.
        mask: `[T, N]`, minus infinity where a token must not look; None for plain causal if T = N.

    Returns:
        `[T, H, D]`.
    """
    tokens, heads, size = q.shape
    kv_heads = cache.shape[3]
    keys, values = _gather(cache, places[None])
    if mask is None:
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)
    group = heads // kv_heads
    grouped = q.view(tokens, kv_heads, group, size).permute(1, 2, 0, 3).reshape(1, kv_heads, group * tokens, size)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask.repeat(group, 1))
    return out.view(kv_heads, group, tokens, size).permute(2, 0, 1, 3).reshape(tokens, heads, size)


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of the sum of each query's weights, `[B, H, T]` in float32."""
    # NOTE: what scaled_dot_product_attention calls on a CPU; it gives no logarithms away itself.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, attn_mask=mask)
    return out, lse


def _gather(cache: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, `[B, K, N, D]`, of `[B, N]` places."""
    shape, places = (*places.shape, *cache.shape[3:]), places.flatten()
    # NOTE: along the first dimension, because torch selects from no other with more than one thread.
    keys, values = (side.index_select(0, places).view(shape).transpose(1, 2) for side in cache.flatten(1, 2))
    return keys, values
