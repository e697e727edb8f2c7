"""Copies of pages, as Triton's interpreter makes them, against the plain operation."""

import pytest
import torch

from treadle.kernels import pages, reference

LAYERS, PAGES = 2, 5


def cache(dtype, num_pages=PAGES, page=(4, 2, 24)):
    numbers = torch.arange(LAYERS * 2 * num_pages * page[0] * page[1] * page[2]) * 7919 % 251
    return numbers.view(LAYERS, 2, num_pages, *page).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("page", [(4, 2, 24), (16, 4, 80)], ids=str)
def test_pages_are_copied_in_all_layers(page, dtype):
    source, target = cache(dtype, page=page), torch.zeros(LAYERS, 2, 3, *page, dtype=dtype)
    expected = target.clone()
    pairs = torch.tensor([4, 1]), torch.tensor([0, 2])
    pages.copy_pages(source, target, *pairs)
    reference.copy_pages(source.view(torch.uint8), expected.view(torch.uint8), *pairs)
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))


def test_pages_are_copied_within_a_cache_and_one_may_be_copied_twice():
    found, expected = cache(torch.float32), cache(torch.float32)
    pairs = torch.tensor([0, 0, 4]), torch.tensor([1, 3, 2])
    pages.copy_pages(found, found, *pairs)
    reference.copy_pages(expected, expected, *pairs)
    assert torch.equal(found, expected)


def test_scales_are_copied_too():
    source, target = cache(torch.float16, page=(4, 2, 1))[..., 0].contiguous(), torch.zeros(LAYERS, 2, 2, 4, 2).half()
    pages.copy_pages(source, target, torch.tensor([3]), torch.tensor([1]))
    assert torch.equal(target[:, :, 1], source[:, :, 3]) and not target[:, :, 0].any()


def test_a_cache_may_have_more_elements_than_32_bits_count():
    # Memory that is never touched is never there.
    num_pages, page = 2**26, (2, 1, 32)
    huge = torch.empty(1, 2, num_pages, *page, dtype=torch.int8)
    huge[:, :, num_pages - 1] = 5
    small = torch.zeros(1, 2, 2, *page, dtype=torch.int8)
    pages.copy_pages(huge, small, torch.tensor([num_pages - 1]), torch.tensor([1]))
    assert bool((small[:, :, 1] == 5).all()) and not small[:, :, 0].any()
    pages.copy_pages(small, huge, torch.tensor([0]), torch.tensor([num_pages - 1]))
    assert not huge[:, :, num_pages - 1].any()


def test_no_pages():
    found = cache(torch.float32)
    pages.copy_pages(found, found, *torch.empty(2, 0, dtype=torch.int64))
    assert torch.equal(found, cache(torch.float32))
