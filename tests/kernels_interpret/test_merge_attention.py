"""Parts of a context put together, as Triton's interpreter computes it, against the formula."""

import math

import pytest
import torch

from treadle.kernels.merge import merge


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_count_by_their_weights_and_empty_ones_are_not_read(size, parts):
    torch.manual_seed(parts)
    sums = torch.randn(3, 2, parts, size)
    weights = torch.randn(3, 2, parts) * 8 + 1000
    weights[0, 0, 0] = weights[2] = -math.inf
    sums[weights == -math.inf] = math.nan
    share = torch.where(weights == -math.inf, 0, (weights - 1000).double().exp2())
    expected = (sums.double().nan_to_num(0) * share[..., None]).sum(2) / share.sum(2).clamp(min=1e-9)[..., None]
    torch.testing.assert_close(merge(sums, weights, torch.float32), expected.float())


def test_a_part_that_is_not_finite_stays_so():
    sums, weights = torch.ones(1, 1, 2, 16), torch.zeros(1, 1, 2)
    weights[0, 0, 1] = math.nan
    assert merge(sums, weights, torch.float16).isnan().all()
