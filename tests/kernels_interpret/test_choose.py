"""Choosing tokens without sorting chooses what plain torch does."""

import math
from itertools import product
from random import Random

import pytest
import torch

from treadle.kernels import choose as module
from treadle.kernels import sampling
from treadle.kernels.choose import choose
from treadle.kernels.sampling import gumbel_noise
from treadle.scheduler import SamplingParams


def parameters(**each):
    """Columns to rows: `temperature=[0.5, 1], top_k=[3]` are all four combinations of them with the rest off."""
    return [SamplingParams(**dict(zip(each, values, strict=True))) for values in product(*each.values())]


def chosen(choose, logits, params, positions, bitmasks=None, mask_rows=None):
    def column(name, dtype=torch.float32):
        return torch.tensor([getattr(p, name) for p in params], dtype=dtype)

    return choose(
        logits,
        temperatures=column("temperature"),
        top_k=column("top_k", torch.int64),
        top_p=column("top_p"),
        min_p=column("min_p"),
        seeds=column("seed", torch.int64),
        positions=positions,
        bitmasks=bitmasks,
        mask_rows=torch.full((len(params),), -1) if mask_rows is None else mask_rows,
    ).tolist()


def agree(logits, params, bitmasks=None, mask_rows=None, first_position=0):
    positions = torch.arange(len(params)) * 1_000_003 + first_position
    before = logits.clone()
    tokens = chosen(choose, logits, params, positions, bitmasks, mask_rows)
    assert torch.equal(logits, before) or not before.isfinite().all()
    assert tokens == chosen(sampling.choose, before, params, positions, bitmasks, mask_rows)
    return tokens


def random(*shape, seed=0, scale=3.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FILTERS = [
    {},
    {"top_k": [1, 3, 40]},
    {"top_p": [1e-6, 0.3, 0.9, 0.999]},
    {"min_p": [0.02, 0.5, 1.0]},
    {"top_k": [5, 60], "top_p": [0.5, 0.95], "min_p": [0.0, 0.1]},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("size", [7, 100, module.BLOCK + 77])
def test_tokens_are_those_of_the_sampler(size, filters):
    params = parameters(temperature=[0.7, 1.5], seed=[-(2**60) + 3], **filters)
    agree(random(len(params), size, seed=size), params, first_position=size)


@pytest.mark.parametrize("seed", range(2))
def test_any_mixture_of_rows_over_several_blocks(seed, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)
    numbers = Random(seed)
    rows, size = 12, 32 * 3 + numbers.randrange(1, 32)
    params = [
        SamplingParams(
            temperature=numbers.choice([0.0, 0.3, 1.0, 3.0]),
            top_k=numbers.choice([0, 1, 2, 7, 50, size - 1]),
            top_p=numbers.choice([1.0, numbers.random(), 0.99]),
            min_p=numbers.choice([0.0, 0.0, numbers.random() / 4]),
            seed=numbers.randrange(2**63),
        )
        for _ in range(rows)
    ]
    logits = (
        random(rows, size, seed=seed) * torch.tensor([numbers.choice([0.1, 1.0, 4.0]) for _ in range(rows)])[:, None]
    )
    bitmasks = torch.tensor([[numbers.randrange(-(2**31), 2**31) for _ in range(4)] for _ in range(3)]).int()
    mask_rows = torch.tensor([numbers.randrange(-1, 3) for _ in range(rows)], dtype=torch.int32)
    agree(logits, params, bitmasks, mask_rows)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32, 2**63 - 1, -(2**63)])
def test_noise_depends_on_all_bits_of_the_seed(seed):
    agree(random(3, 50), parameters(temperature=[1.0], seed=[seed] * 3), first_position=2**31 - 1_000_000)


def test_temperatures_that_mean_greedy():
    params = parameters(temperature=[0.0, 1e-30, 1e-5], top_k=[0, 2], top_p=[1.0, 0.5])
    logits = random(len(params), 300)
    assert agree(logits, params) == logits.argmax(-1).tolist()


def test_of_equal_logits_top_k_keeps_all():
    logits = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 3.0]).repeat(12, 1)
    assert set(agree(logits, [SamplingParams(temperature=50.0, top_k=2)] * 12)) == {1, 3, 5}
    zeros = torch.tensor([-0.0, 0.0]).repeat(8, 1)
    assert set(agree(zeros, [SamplingParams(temperature=1.0, top_k=1)] * 8)) == {0, 1}


@pytest.mark.parametrize(("size", "p"), [(8, 0.5), (2 * module.BLOCK + 10, 0.75)])
def test_of_equal_logits_top_p_keeps_the_first(size, p):
    positions = torch.arange(6)
    tokens = chosen(choose, torch.zeros(6, size), [SamplingParams(top_p=p)] * 6, positions)
    noise = gumbel_noise(torch.zeros(6, dtype=torch.int64), positions, size)
    assert tokens == noise[:, : math.ceil(p * size)].argmax(-1).tolist()


def test_top_k_of_the_whole_vocabulary_or_more_is_none():
    params = parameters(temperature=[1.0], top_k=[20, 21, 10**6, 2**31 - 1, 19])
    agree(random(len(params), 20), params)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e4, 1e30])
def test_logits_of_any_size(scale):
    params = parameters(temperature=[1.0, 100.0], top_k=[0, 4], top_p=[1.0, 0.8])
    agree(random(len(params), 60, scale=scale), params)


def test_rows_use_their_bitmasks():
    size = 2 * 32 + 5
    bitmasks = torch.randint(-(2**31), 2**31, (3, 3), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    bitmasks[1] = 0
    bitmasks[1, 2] = 1 << 4
    params = parameters(temperature=[0.0, 1.0], top_k=[0, 30], top_p=[1.0, 0.9])
    mask_rows = torch.tensor([2, -1, 0, 1, 1, 0, -1, 2], dtype=torch.int32)
    tokens = agree(random(len(params), size), params, bitmasks, mask_rows)
    assert tokens[3] == tokens[4] == size - 1


@pytest.mark.parametrize(
    "params", parameters(temperature=[0.0, 1.0], top_k=[0, 3]), ids=["best", "best-3", "any", "any-3"]
)
def test_rows_whose_best_logit_is_not_finite_have_no_token(params):
    logits = random(6, module.BLOCK + 9)
    logits[0, 5] = math.nan
    logits[1, -1] = math.inf
    logits[2] = -math.inf
    logits[3, ::2] = -math.inf
    logits[5, 3] = -math.nan
    bitmasks = torch.full((2, -(-logits.shape[1] // 32)), -1, dtype=torch.int32)
    bitmasks[0] = 0
    mask_rows = torch.tensor([-1, -1, -1, -1, 0, 1], dtype=torch.int32)
    tokens = agree(logits, [params] * 6, bitmasks, mask_rows)
    assert [token == -1 for token in tokens] == [True, True, True, False, True, True]


def test_what_a_mask_forbids_may_be_nan():
    logits = random(1, 40)
    logits[0, 7] = math.nan
    bitmasks = torch.tensor([[~(1 << 7), -1]], dtype=torch.int32)
    agree(logits, [SamplingParams(top_p=0.9)], bitmasks, torch.tensor([0], dtype=torch.int32))


def test_a_token_does_not_depend_on_the_batch():
    logits, params = random(4, 90), parameters(temperature=[0.8], top_p=[1.0, 0.7], top_k=[0, 9])
    positions = torch.arange(4)
    together = chosen(choose, logits, params, positions)
    order = [2, 0, 3, 1]
    assert chosen(choose, logits[order], [params[i] for i in order], positions[order]) == [together[i] for i in order]
    assert chosen(choose, logits[2:3], params[2:3], positions[2:3]) == together[2:3]


def test_no_rows():
    assert chosen(choose, torch.empty(0, 50), [], torch.empty(0, dtype=torch.int64)) == []
