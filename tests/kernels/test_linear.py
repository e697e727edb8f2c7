"""Products with a model's weights: packing changes the layout, not the result; logits are not rounded to bfloat16."""

import pytest
import torch

from treadle.kernels.linear import Linear, can_pack

needs_packing = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this processor does not multiply bfloat16"
)
TOKENS = [0, 1, 2, 5, 16, 64, 300]


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@needs_packing
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_packed_weights_give_the_same_product(tokens, with_bias):
    weight, bias, x = random(200, 72), random(200) if with_bias else None, random(tokens, 72)
    with torch.inference_mode():
        plain, packed = (Linear(weight, bias, packed=on)(x) for on in (False, True))
    assert packed.shape == (tokens, 200) and packed.dtype == torch.bfloat16
    # One rounding, of sums in another order.
    torch.testing.assert_close(packed, plain, rtol=2**-7, atol=1e-3)


@needs_packing
def test_inputs_may_be_views():
    weight, x = random(200, 72), random(8, 144)[:, ::2]
    torch.testing.assert_close(Linear(weight)(x), Linear(weight)(x.contiguous()))
    torch.testing.assert_close(Linear(weight).in_float32(x), Linear(weight).in_float32(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_products_in_float32_are_exact_to_sixteen_bits(tokens, packed, dtype):
    weight, x = random(3000, 96, dtype=dtype), random(tokens, 96, dtype=dtype)
    with torch.inference_mode():
        out = Linear(weight, packed=packed).in_float32(x)
    assert out.shape == (tokens, 3000) and out.dtype == torch.float32
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=2**-16, atol=1e-4)


def test_the_two_best_of_many_are_told_apart():
    """Of as many logits as a vocabulary has, rounded ones tie often."""
    weight, x = random(49_152, 64), random(64, 64)
    linear = Linear(weight)
    for logits, ties_expected in ((linear(x).float(), True), (linear.in_float32(x), False)):
        best = logits.topk(2, -1).values
        assert bool((best[:, 0] == best[:, 1]).any()) == ties_expected
