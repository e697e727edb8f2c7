"""The kernels between matrix products, as Triton's interpreter computes them, against the plain operations."""

import math

import pytest
import torch

from treadle.kernels import fused, reference

EPS = 1e-6
HALVES = {torch.float32: {}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}
"""How close results come: float16 ones are rounded once by the kernels, and several times by the plain operations."""
KV_HEADS, PAGES, PAGE = 2, 3, 4

types = pytest.mark.parametrize("dtype", HALVES)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@types
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (2, 130)])
def test_rms_norm(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype)
    expected = reference.rms_norm(x, weight, EPS)
    torch.testing.assert_close(fused.rms_norm(x, weight, EPS), expected, **HALVES[dtype])


@types
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (2, 130)])
def test_a_sum_is_rounded_once_and_normed_as_rounded(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype)
    residual = 9 * x.flip(0).flip(1)
    normed, total = fused.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, fused.rms_norm(total, weight, EPS))
    torch.testing.assert_close(normed, reference.rms_norm(total, weight, EPS), **HALVES[dtype])


def test_rows_may_lie_apart():
    wide, weight = random(4, 64), random(32)
    x, residual = wide[:, :32], wide[:, 32:]
    assert torch.equal(fused.rms_norm(x, weight, EPS), fused.rms_norm(x.contiguous(), weight, EPS))
    torch.testing.assert_close(
        fused.add_rms_norm(x, residual, weight, EPS), reference.add_rms_norm(x, residual, weight, EPS)
    )
    assert torch.equal(fused.swiglu(x), fused.swiglu(x.contiguous()))


def test_a_row_that_is_not_finite_spoils_no_other():
    x = random(3, 48)
    x[1, 7] = math.nan
    normed = fused.rms_norm(x, random(48), EPS)
    assert normed.isfinite().all(1).tolist() == [True, False, True]


@types
@pytest.mark.parametrize("shape", [(1, 2), (3, 74), (2, 2 * (fused.SWIGLU_BLOCK + 5))])
def test_swiglu(shape, dtype):
    gate_up = 4 * random(*shape, dtype=dtype)
    torch.testing.assert_close(fused.swiglu(gate_up), reference.swiglu(gate_up), **HALVES[dtype])


def step(dtype, size, group, tokens, norms=True):
    """The arguments of `norm_rope_write` up to the angles, and places of which the last is padding."""
    qkv = random(tokens, KV_HEADS * (group + 2), size, dtype=dtype)
    weights = [random(size, dtype=dtype), random(size + 1, dtype=dtype)[1:].clone()] if norms else [None, None]
    angles = 3 * random(tokens, 1, size // 2)
    angles = torch.cat((angles, angles), -1)
    places = torch.tensor([*[7, 2, 11, 0, 5][: tokens - 1], -1])
    return (qkv, *weights, EPS, angles.cos().to(dtype), angles.sin().to(dtype)), places


def write_by_reference(qkv, q_norm, k_norm, eps, cos, sin, cache, places, scales=None):
    """The same in plain torch, which knows no padding."""
    real = places >= 0
    reference.norm_rope_write(qkv[real], q_norm, k_norm, eps, cos[real], sin[real], cache, places[real], scales)
    return reference.norm_rope_write(
        qkv, q_norm, k_norm, eps, cos, sin, torch.zeros(cache.shape, dtype=qkv.dtype), places.abs()
    )


def empty_cache(dtype, size):
    return torch.full((2, PAGES, PAGE, KV_HEADS, size), 3.0).to(dtype)


@types
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("size", "group", "tokens"), [(64, 1, 2), (96, 3, 4), (128, 4, 3), (16, 7, 1), (80, 8, 2)])
def test_queries_are_turned_and_keys_and_values_written(size, group, tokens, norms, dtype):
    arguments, places = step(dtype, size, group, tokens, norms)
    found, expected = empty_cache(dtype, size), empty_cache(dtype, size)
    q = fused.norm_rope_write(*arguments, found, places)
    torch.testing.assert_close(q, write_by_reference(*arguments, expected, places), **HALVES[dtype])
    torch.testing.assert_close(found, expected, **HALVES[dtype])
    assert torch.equal(found[1], expected[1]), "values are stored as they are"


def test_padding_writes_nothing():
    arguments, places = step(torch.float32, 64, 2, 3)
    cache, scales = empty_cache(torch.int8, 64), torch.full((2, PAGES, PAGE, KV_HEADS), 3.0)
    fused.norm_rope_write(*arguments, cache, torch.full_like(places, -1), scales)
    assert torch.equal(cache, empty_cache(torch.int8, 64)) and bool((scales == 3.0).all())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("code_dtype", reference.CODE_LIMITS)
def test_a_quantised_cache_holds_what_was_written_within_a_step_of_its_codes(code_dtype, scale_dtype):
    size = 96
    arguments, places = step(torch.float32, size, 3, 4)
    arguments[0][0, -1] = 0  # a value of zeros
    exact = empty_cache(torch.float32, size)
    write_by_reference(*arguments, exact, places)
    half_step = {torch.int8: 0.5, torch.float8_e4m3fn: 16.0}[code_dtype]  # of the largest codes
    for write in (fused.norm_rope_write, write_by_reference):
        cache = empty_cache(code_dtype, size)
        scales = torch.ones(2, PAGES, PAGE, KV_HEADS, dtype=scale_dtype)
        write(*arguments, cache, places, scales)
        found = reference.dequantize_kv(cache, scales)
        off = (found - exact).abs()
        if code_dtype == torch.float8_e4m3fn:
            # Triton 3.9's interpreter halves what rounds up to a power of two.
            off = off.minimum((2 * found - exact).abs())
        assert bool((off <= scales.float()[..., None] * half_step * 1.01 + 1e-7).all())
        written = torch.zeros(PAGES * PAGE, dtype=torch.bool).index_fill(0, places[:-1], True)
        assert bool((scales.flatten(1, 2)[:, ~written] == 1).all())


@pytest.mark.parametrize("code_dtype", reference.CODE_LIMITS)
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_in_the_scales(spoilt, code_dtype):
    arguments, places = step(torch.float32, 64, 1, 3, norms=False)
    qkv = arguments[0]
    qkv[0, 3, 5] = qkv[1, 4, 40] = spoilt  # a key of head 1, and a value of head 0
    for write in (fused.norm_rope_write, write_by_reference):
        cache, scales = empty_cache(code_dtype, 64), torch.ones(2, PAGES, PAGE, KV_HEADS)
        write(*arguments, cache, places, scales)
        broken = ~scales.isfinite().flatten(1, 2)
        assert broken.nonzero().tolist() == [[0, places[0], 1], [1, places[1], 0]]
        assert torch.equal(reference.dequantize_kv(cache, scales).isfinite().all(-1), scales.isfinite())
