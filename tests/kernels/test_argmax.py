"""The best logit of a row, looked for in blocks."""

from __future__ import annotations

import pytest
import torch

from treadle.kernels.sampling import argmax

WIDTHS = (1, 20, 96, 257, 512, 4096)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_the_first_of_the_largest(width):
    # Of few values, so that most are there more than once.
    logits = torch.randint(-3, 4, (50, width), generator=torch.Generator().manual_seed(width)).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert argmax(logits).tolist() == expected


@pytest.mark.parametrize("width", WIDTHS)
def test_a_nan_is_found_before_anything(width):
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(50, width, generator=generator)
    places = torch.randint(width, (50,), generator=generator)
    logits[torch.arange(50), places] = float("nan")
    assert torch.equal(argmax(logits), places)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_token_that_is_allowed_is_found(width):
    logits = torch.full((3, width), float("-inf"))
    logits[:, width // 2] = -5.0
    assert argmax(logits).tolist() == [width // 2] * 3


def test_rows_need_not_lie_side_by_side():
    logits = torch.randn(512, 8, generator=torch.Generator().manual_seed(1)).t()
    assert torch.equal(argmax(logits), logits.contiguous().argmax(-1))


@pytest.mark.parametrize("width", WIDTHS)
def test_there_may_be_no_rows(width):
    assert argmax(torch.empty(0, width)).shape == (0,)
