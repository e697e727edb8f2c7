"""Products with a model's weights: packing changes the layout, not the result."""

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
