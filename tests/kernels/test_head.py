"""Logits are not rounded to bfloat16, at least not those that may be chosen."""

import math

import pytest
import torch

from treadle.kernels import head as head_module
from treadle.kernels.head import Head
from treadle.kernels.int4 import FEW_ROWS, can_multiply_int4
from treadle.kernels.linear import Linear

needs_int4 = pytest.mark.skipif(
    not can_multiply_int4(torch.device("cpu"), torch.bfloat16),
    reason="this processor has no product with 4-bit weights",
)
VOCABULARY, SIZE = 49_152, 64


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def peaked(rows):
    """Inputs that have some tokens in mind, as those of a language model do."""
    weight = random(VOCABULARY, SIZE)
    meant = weight[torch.arange(rows) * 37].float() / 3
    return weight, (meant + random(rows, SIZE, dtype=torch.float32) / 4).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 16, 64, 300])
def test_logits_are_exact_to_sixteen_bits(tokens, packed, dtype):
    weight, x = random(3000, 96, dtype=dtype), random(tokens, 96, dtype=dtype)
    with torch.inference_mode():
        out = Head(weight, packed=packed)(x)
    assert out.shape == (tokens, 3000) and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=2**-16, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_may_be_views(packed):
    head, x = Head(random(200, 72), packed=packed), random(8, 144)[:, ::2]
    torch.testing.assert_close(head(x), head(x.contiguous()))


def test_the_two_best_of_many_are_told_apart():
    """Of as many logits as a vocabulary has, rounded ones tie often."""
    weight, x = random(VOCABULARY, SIZE), random(64, SIZE)
    for logits, ties_expected in ((Linear(weight)(x).float(), True), (Head(weight)(x), False)):
        best = logits.topk(2, -1).values
        assert bool((best[:, 0] == best[:, 1]).any()) == ties_expected


@needs_int4
@pytest.mark.parametrize("rows", [0, 1, 3, FEW_ROWS])
def test_from_8_bits_the_logits_near_the_best_are_exact_and_the_others_roughly_so(rows):
    weight, x = peaked(rows)
    with torch.inference_mode():
        out = Head(weight, int8=True)(x)
    assert out.shape == (rows, VOCABULARY) and out.dtype == torch.float32
    exact = x.double() @ weight.double().T
    if rows:
        near = exact >= exact.amax(-1, keepdim=True) - 4
        assert near.any(-1).all()
        torch.testing.assert_close(out.double()[near], exact[near], rtol=2**-16, atol=1e-4)
        assert (out - exact).abs().max() < 0.02 * exact.abs().max()
    assert torch.equal(out.argmax(-1), exact.argmax(-1))


@needs_int4
def test_from_8_bits_a_row_does_not_depend_on_the_others():
    weight, x = peaked(FEW_ROWS)
    head = Head(weight, int8=True)
    with torch.inference_mode():
        assert torch.equal(head(x), torch.cat([head(row[None]) for row in x]))


@needs_int4
def test_more_inputs_meet_the_bfloat16_weights():
    weight, x = peaked(FEW_ROWS + 1)
    with torch.inference_mode():
        assert torch.equal(Head(weight, int8=True)(x), Head(weight)(x))


@needs_int4
def test_where_too_many_are_near_the_best_all_are_exact(monkeypatch):
    weight, x = peaked(2)
    monkeypatch.setattr(head_module, "MOST_NEAR", 1)
    with torch.inference_mode():
        assert torch.equal(Head(weight, int8=True)(x), Head(weight)(x))
        flat = Head(weight, int8=True)(torch.zeros(2, SIZE, dtype=torch.bfloat16))
    assert torch.equal(flat, torch.zeros(2, VOCABULARY))


@needs_int4
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_from_8_bits_what_is_not_finite_stays_so(bad):
    weight, x = peaked(2)
    x[1, 5] = bad
    with torch.inference_mode():
        out = Head(weight, int8=True)(x)
    assert out[0].isfinite().all() and not out[1].max().isfinite()
