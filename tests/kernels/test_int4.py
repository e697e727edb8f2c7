"""Weights in 4 bits: a product as exact as in bfloat16, and the other form of it where there are more inputs."""

import pytest
import torch

from treadle.kernels.codes import Int4Matrix, concat_rows, quantize_int4
from treadle.kernels.int4 import FEW_ROWS, Int4Linear, can_multiply_int4, fits_int4
from treadle.kernels.linear import Linear

needs_int4 = pytest.mark.skipif(
    not can_multiply_int4(torch.device("cpu"), torch.bfloat16),
    reason="this processor has no product with 4-bit weights",
)
ONE_ROUNDING = 2**-8
"""To bfloat16, relative."""


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def matrix(out_features, in_features, symmetric):
    """Random codes under scales of many sizes. `symmetric` is as in Q4_0, otherwise as in Q4_1."""
    groups = out_features, in_features // 32
    codes = torch.randint(0, 16, (out_features, in_features), generator=torch.Generator().manual_seed(0))
    scales = random(*groups).exp()
    minima = -8 * scales if symmetric else -7 * scales + random(*groups)
    return Int4Matrix(codes.to(torch.uint8), scales, minima)


def relative_error(out, weight, x, bias=None):
    """Of a product, against float64."""
    exact = x.double() @ weight.dequantize().double().T
    exact = exact if bias is None else exact + bias.double()
    return float((out.double() - exact).norm() / exact.norm()) if len(x) else 0.0


@needs_int4
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(16, 32), (80, 96), (576, 1536)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, FEW_ROWS, FEW_ROWS + 1, 100])
def test_a_product_is_as_exact_as_one_rounding_to_bfloat16(tokens, shape, symmetric, with_bias):
    weight, x = matrix(*shape, symmetric), random(tokens, shape[1]).bfloat16()
    bias = random(shape[0]).bfloat16() if with_bias else None
    many = Linear(weight.dequantize().bfloat16(), bias)
    for linear in (Int4Linear(weight, bias), Int4Linear(weight, bias, many=many)):
        out = linear(x)
        assert out.shape == (tokens, shape[0]) and out.dtype == torch.bfloat16
        assert relative_error(out, weight, x, bias) < ONE_ROUNDING


@needs_int4
def test_few_inputs_meet_the_codes_and_more_the_bfloat16_weights():
    weight = matrix(64, 96, symmetric=False)
    codes, many = Int4Linear(weight), Linear(weight.dequantize().bfloat16())
    both = Int4Linear(weight, many=many)
    few, more = random(FEW_ROWS, 96).bfloat16(), random(FEW_ROWS + 1, 96).bfloat16()
    assert torch.equal(both(few), codes(few)) and not torch.equal(both(few), many(few))
    assert torch.equal(both(more), many(more)) and not torch.equal(both(more), codes(more))


@needs_int4
@pytest.mark.parametrize("tokens", range(1, FEW_ROWS + 1))
def test_a_row_does_not_depend_on_the_rows_beside_it(tokens):
    linear, x = Int4Linear(matrix(80, 96, symmetric=False)), random(FEW_ROWS, 96).bfloat16()
    assert torch.equal(linear(x[:tokens]), linear(x)[:tokens])


@needs_int4
def test_inputs_may_be_views():
    linear, x = Int4Linear(matrix(80, 96, symmetric=True)), random(5, 192).bfloat16()[:, ::2]
    assert torch.equal(linear(x), linear(x.contiguous()))


@needs_int4
def test_joined_matrices_give_the_outputs_of_each():
    parts = [matrix(rows, 96, symmetric) for rows, symmetric in ((32, True), (16, False), (48, True))]
    x = random(4, 96).bfloat16()
    assert torch.equal(Int4Linear(concat_rows(parts))(x), torch.cat([Int4Linear(part)(x) for part in parts], -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_is_off_by_half_a_step_at_most(dtype):
    weight = random(48, 320).to(dtype)
    quantised = quantize_int4(weight)
    assert quantised.codes.shape == weight.shape and quantised.scales.shape == quantised.minima.shape == (48, 10)
    error = (quantised.dequantize() - weight.float()).abs().view(48, 10, 32).amax(-1)
    assert bool((error <= quantised.scales * 0.5001).all())


def test_weights_that_are_all_the_same_stay_so():
    weight = torch.tensor([[0.0] * 32 + [0.3] * 32, [-7.0] * 32 + [1e-40] * 32])
    assert torch.equal(quantize_int4(weight).dequantize(), weight)


@pytest.mark.parametrize(("shape", "fits"), [((16, 32), True), ((24, 32), False), ((16, 48), False)])
def test_shapes_that_the_product_takes(shape, fits):
    assert fits_int4(*shape) == fits


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_only_bfloat16_on_a_processor_is_multiplied(device, dtype):
    assert not can_multiply_int4(torch.device(device), dtype)
