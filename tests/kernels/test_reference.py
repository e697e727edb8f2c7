"""The operations against the plainest formula for each, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.kernels import reference as ops

KV_HEADS, GROUP, SIZE, PAGE, PAGES = 2, 3, 16, 4, 24


def naive_attention(q, keys, values, visible):
    """`[H, D]` of one query against `[T, K, D]`, looking only where `visible` says."""
    keys, values = (x.double().repeat_interleave(GROUP, 1) for x in (keys, values))
    scores = torch.einsum("hd,thd->ht", q.double(), keys) / math.sqrt(SIZE)
    scores[:, ~visible] = -torch.inf
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values).float()


def paged_contexts(lengths, generator):
    """A cache with NaN everywhere but in some contexts, whose pages lie in random order; and of each its places, keys
    and values."""
    cache = torch.full((2, len(lengths) * PAGES, PAGE, KV_HEADS, SIZE), math.nan)
    order = torch.randperm(cache.shape[1], generator=generator).view(len(lengths), PAGES)
    contexts = []
    for length, pages in zip(lengths, order, strict=True):
        keys, values = torch.randn(2, length, KV_HEADS, SIZE, generator=generator)
        places = pages[torch.arange(length) // PAGE] * PAGE + torch.arange(length) % PAGE
        ops.write_kv(cache, keys, values, places)
        contexts.append((places, keys, values))
    return cache, contexts


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 2**30))
@settings(max_examples=40, deadline=None)
def test_decode_attention(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    cache, contexts = paged_contexts(lengths, generator)
    longest = max(lengths)
    q = torch.randn(len(lengths), KV_HEADS * GROUP, SIZE, generator=generator)
    padded = torch.stack([torch.cat((places, places[-1:].expand(longest - len(places)))) for places, _, _ in contexts])
    hidden = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]
    out = ops.decode_attention(q, cache, padded, mask if hidden.any() else None)
    for row, (_, keys, values) in enumerate(contexts):
        expected = naive_attention(q[row], keys, values, torch.ones(len(keys), dtype=torch.bool))
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 7), (0, 40), (5, 1), (5, 9), (16, 16), (33, 7)])
def test_prefill_attention(start, count):
    generator = torch.Generator().manual_seed(start * 100 + count)
    cache, [(places, keys, values)] = paged_contexts([start + count], generator)
    q = torch.randn(count, KV_HEADS * GROUP, SIZE, generator=generator)
    positions = torch.arange(start + count)
    hidden = positions > torch.arange(start, start + count)[:, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf) if start else None
    out = ops.prefill_attention(q, cache, places, mask)
    for index in range(count):
        expected = naive_attention(q[index], keys, values, ~hidden[index])
        torch.testing.assert_close(out[index], expected, rtol=1e-4, atol=1e-5)


def test_copying_pages_reads_before_it_writes():
    cache = torch.arange(4.0).view(1, 1, 4, 1, 1, 1).expand(2, 2, 4, 3, 1, 1).clone()
    ops.copy_pages(cache, cache, torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]))
    assert cache[0, 0, :, 0, 0, 0].tolist() == [0, 0, 1, 2]


def test_rope_turns_by_angles_and_keeps_lengths():
    x = torch.randn(5, 3, SIZE)
    angles = torch.rand(5, 1, SIZE // 2) * 6
    angles = torch.cat((angles, angles), -1)
    turned = ops.apply_rope(x, angles.cos(), angles.sin())
    left, right = (torch.complex(*half.chunk(2, -1)) for half in (x, turned))
    torch.testing.assert_close(right, left * torch.exp(1j * angles[..., : SIZE // 2]))


def test_rms_norm():
    x, weight = torch.randn(4, 10), torch.randn(10)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected)


def test_swiglu():
    gate, up = torch.randn(2, 4, 6)
    expected = gate * gate.sigmoid() * up
    torch.testing.assert_close(ops.swiglu(torch.cat((gate, up), -1)), expected)


@pytest.mark.parametrize("shared", [PAGE, 3 * PAGE])
@pytest.mark.parametrize("lengths", [[1], [1, 1], [5, 2, 9]])
def test_shared_decode_attention(shared, lengths):
    generator = torch.Generator().manual_seed(shared)
    cache, contexts = paged_contexts([shared, *lengths], generator)
    (beginning, first_keys, first_values), *rest = contexts
    longest = max(lengths)
    q = torch.randn(len(lengths), KV_HEADS * GROUP, SIZE, generator=generator)
    padded = torch.stack([torch.cat((places, places[-1:].expand(longest - len(places)))) for places, _, _ in rest])
    hidden = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]
    out = ops.shared_decode_attention(q, cache, beginning, padded, mask if hidden.any() else None)
    for row, (_, keys, values) in enumerate(rest):
        keys, values = torch.cat((first_keys, keys)), torch.cat((first_values, values))
        expected = naive_attention(q[row], keys, values, torch.ones(len(keys), dtype=torch.bool))
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)
