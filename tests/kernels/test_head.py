"""Logits are not rounded to bfloat16, at least not those that may be chosen."""

import math

import pytest
import torch

from treadle.kernels import head as head_module
from treadle.kernels.head import FEW_ROWS, Head
from treadle.kernels.linear import Linear, can_pack

needs_packing = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this processor does not multiply bfloat16"
)
VOCABULARY, SIZE = 49_152, 64
ROWS = [0, 1, 3, FEW_ROWS, FEW_ROWS + 1, 64]


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def peaked(rows):
    """Inputs that have some tokens in mind, as those of a language model do."""
    weight = random(VOCABULARY, SIZE)
    meant = weight[torch.arange(rows) * 37].float() / 3
    return weight, (meant + random(rows, SIZE, dtype=torch.float32) / 4).bfloat16()


def assert_exact(logits, x, weight):
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=2**-16, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_logits_of_a_weight_that_is_not_packed_are_exact(rows, dtype):
    weight, x = random(3000, 96, dtype=dtype), random(rows, 96, dtype=dtype)
    logits = Head(weight, packed=False)(x)
    assert logits.shape == (rows, 3000) and logits.dtype == torch.float32
    assert_exact(logits, x, weight)


@needs_packing
@pytest.mark.parametrize("rows", ROWS)
def test_logits_near_the_best_are_exact_and_the_others_rounded(rows):
    weight, x = peaked(rows)
    with torch.inference_mode():
        logits = Head(weight)(x)
    assert logits.shape == (rows, VOCABULARY) and logits.dtype == torch.float32
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(logits.double(), exact, rtol=2**-8, atol=1e-3)
    if rows:
        near = exact >= exact.amax(-1, keepdim=True) - 4
        assert near.any(-1).all() and not near.all()
        torch.testing.assert_close(logits.double()[near], exact[near], rtol=2**-16, atol=1e-4)
        assert torch.equal(logits.argmax(-1), exact.argmax(-1))


@needs_packing
@pytest.mark.parametrize("rows", ROWS)
def test_where_too_many_are_near_the_best_all_are_exact(monkeypatch, rows):
    weight, x = peaked(rows)
    monkeypatch.setattr(head_module, "MOST_NEAR", 0)
    with torch.inference_mode():
        assert_exact(Head(weight)(x), x, weight)


@needs_packing
def test_logits_that_are_all_alike_stay_so():
    weight = random(VOCABULARY, SIZE)
    with torch.inference_mode():
        assert not Head(weight)(torch.zeros(2, SIZE, dtype=torch.bfloat16)).any()


@needs_packing
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(bad):
    weight, x = peaked(2)
    x[1, 5] = bad
    with torch.inference_mode():
        logits = Head(weight)(x)
    assert logits[0].isfinite().all() and not logits[1].max().isfinite()


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
