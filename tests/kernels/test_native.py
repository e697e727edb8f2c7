"""The operations of `native.c`, against the same in plain torch."""

import dataclasses
import math

import pytest
import torch
from support import native_parts

from treadle.kernels import reference
from treadle.kernels.codes import Int8Matrix, quantize_int4, quantize_int8
from treadle.kernels.native import NativeUnavailable, load_native
from treadle.kernels.native_layers import NativeLayers
from treadle.kernels.native_linear import NativeLinear
from treadle.runtime.config import c_compiler, cache_dir

try:
    NATIVE = load_native(cache_dir(), c_compiler())
except NativeUnavailable as reason:
    pytest.skip(f"native.c is not for this machine: {reason}", allow_module_level=True)

ONE_ROUNDING = 2**-8
"""To bfloat16, relative."""
FEW = 8
EPS = 1e-5


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def relative_error(out, exact):
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def coded(form, out_features, in_features):
    """A matrix in one of the forms, and the float64 weights that it stands for."""
    weight = random(out_features, in_features)
    if form == "bfloat16":
        return weight.bfloat16(), weight.bfloat16().double()
    matrix = quantize_int4(weight) if form == "int4" else quantize_int8(weight)
    halves = {name: getattr(matrix, name).half().float() for name in matrix._fields if name != "codes"}
    matrix = matrix._replace(**halves)
    return matrix, matrix.dequantize().double()


FORMS = ["bfloat16", "int8", "int4"]
SHAPES = [(16, 32), (48, 96), (80, 64), (576, 1536)]


def test_weights_that_are_tiny_are_not_shifted():
    weight = random(16, 32) * 1e-5
    matrix, x = quantize_int8(weight), random(3, 32).bfloat16()
    out = NativeLinear(NATIVE, matrix, dtype=torch.float32)(x)
    assert relative_error(out, x.double() @ weight.double().T) < 0.2


@pytest.mark.parametrize("form", FORMS)
class TestProducts:
    def test_no_tokens_are_no_outputs(self, form):
        assert NativeLinear(NATIVE, coded(form, 48, 96)[0])(torch.empty(0, 96).bfloat16()).shape == (0, 48)

    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, FEW, FEW + 1, 16, 17, 32, 33, 100, 257, 529])
    def test_they_are_as_exact_as_weights_in_bfloat16(self, form, tokens, shape, with_bias):
        weight, exact = coded(form, *shape)
        x, bias = random(tokens, shape[1]).bfloat16(), random(shape[0]).bfloat16() if with_bias else None
        expected = x.double() @ exact.T + (0 if bias is None else bias.double())
        for dtype in (torch.bfloat16, torch.float32):
            out = NativeLinear(NATIVE, weight, bias, dtype=dtype)(x)
            assert out.dtype == dtype and out.shape == (tokens, shape[0])
            assert relative_error(out, expected) < ONE_ROUNDING

    @pytest.mark.parametrize("tokens", [1, 4, FEW])
    def test_a_few_tokens_are_multiplied_to_sixteen_bits(self, form, tokens):
        weight, exact = coded(form, 96, 1536)
        x = random(tokens, 1536).bfloat16()
        out = NativeLinear(NATIVE, weight, dtype=torch.float32)(x)
        assert relative_error(out, x.double() @ exact.T) < 1e-4

    @pytest.mark.parametrize("tokens", [1, 5, 20, 70, 401])
    def test_gates_are_applied_to_the_other_half(self, form, tokens):
        weight, exact = coded(form, 192, 96)
        x = random(tokens, 96).bfloat16()
        gate, up = (x.double() @ exact.T).chunk(2, -1)
        out = NativeLinear(NATIVE, weight, gated=True)(x)
        assert out.shape == (tokens, 96)
        assert relative_error(out, torch.nn.functional.silu(gate) * up) < ONE_ROUNDING

    @pytest.mark.parametrize("counts", [range(1, FEW + 1), range(FEW + 1, 80, 7), range(80, 640, 111)])
    def test_a_row_does_not_depend_on_the_rows_beside_it(self, form, counts):
        linear, x = NativeLinear(NATIVE, coded(form, 80, 96)[0]), random(max(counts), 96).bfloat16()
        whole = linear(x)
        for tokens in counts:
            assert torch.equal(linear(x[:tokens]), whole[:tokens])

    @pytest.mark.parametrize("tokens", [3, 20])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_shows_in_its_own_row_only(self, form, bad, tokens):
        linear, x = NativeLinear(NATIVE, coded(form, 48, 96)[0]), random(tokens, 96).bfloat16()
        expected = linear(x)
        x[1, 5] = bad
        out = linear(x)
        others = [row for row in range(tokens) if row != 1]
        assert not out[1].isfinite().any()
        assert torch.equal(out[others], expected[others])

    def test_zeros_give_the_bias(self, form):
        bias = random(48).bfloat16()
        out = NativeLinear(NATIVE, coded(form, 48, 96)[0], bias)(torch.zeros(3, 96).bfloat16())
        assert torch.equal(out, bias.expand(3, 48))

    @pytest.mark.parametrize("threads", [1, 2, 3, 7])
    @pytest.mark.parametrize("tokens", [4, 70, 257, 529])
    @pytest.mark.parametrize("outputs", [16, 576])
    def test_the_number_of_threads_changes_nothing(self, form, outputs, tokens, threads):
        linear, before = NativeLinear(NATIVE, coded(form, outputs, 96)[0]), torch.get_num_threads()
        x = random(tokens, 96).bfloat16()
        expected = linear(x)
        torch.set_num_threads(threads)
        try:
            assert torch.equal(linear(x), expected)
        finally:
            torch.set_num_threads(before)


EITHER = pytest.mark.parametrize("tokens", [FEW, FEW + 1, 300])
"""Codes are multiplied as they are, or expanded first."""


@EITHER
def test_codes_of_8_bits_reach_their_ends(tokens):
    codes = torch.arange(-128, 128, dtype=torch.int8).view(8, 32).repeat(2, 1)
    out = NativeLinear(NATIVE, Int8Matrix(codes, torch.ones(16, 1)), dtype=torch.float32)(
        torch.eye(tokens, 32).bfloat16()
    )
    expected = codes.float().T[:tokens]
    if tokens > FEW:  # zero is expanded to 2^-29 of the greatest, which is -128 here, or less
        assert (out[:32] - expected).abs().max() <= 2**-21
        out = out.round()
    assert torch.equal(out[:32], expected)


@EITHER
def test_weights_of_zero_are_zero(tokens):
    x = torch.ones(tokens, 4096).bfloat16()
    for matrix in (quantize_int4(torch.zeros(16, 4096)), quantize_int8(torch.zeros(16, 4096))):
        assert not NativeLinear(NATIVE, matrix, dtype=torch.float32)(x).any()


@EITHER
@pytest.mark.parametrize("small", [0.0, 2**-17])
def test_groups_have_scales_of_their_own(small, tokens):
    codes = torch.randint(-127, 128, (16, 4096), dtype=torch.int8)
    scales = torch.full((16, 128), small)
    scales[:, 0] = 1
    matrix = Int8Matrix(codes, scales)
    x = random(tokens, 4096).bfloat16()
    x[:, :32] = 0
    expected = x.double() @ matrix.dequantize().double().T
    out = NativeLinear(NATIVE, matrix, dtype=torch.float32)(x)
    assert (out - expected).abs().max() <= 1e-4 + expected.abs().max() / 100


@EITHER
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("quantize", [quantize_int4, quantize_int8])
def test_scales_that_are_not_finite_are_noticed(quantize, bad, tokens):
    matrix = quantize(random(32, 96))
    matrix.scales[3, 1] = bad
    out = NativeLinear(NATIVE, matrix, dtype=torch.float32)(random(tokens, 96).bfloat16())
    assert not out[:, 3].isfinite().any()
    assert out[:, 4:].isfinite().all()


@EITHER
def test_there_may_be_more_inputs_than_a_thread_keeps(tokens):
    matrix = quantize_int4(random(32, 20_000 // 32 * 32))
    x = random(tokens, matrix.codes.shape[1]).bfloat16()
    out = NativeLinear(NATIVE, matrix)(x)
    halves = matrix._replace(scales=matrix.scales.half().float(), minima=matrix.minima.half().float())
    assert relative_error(out, x.double() @ halves.dequantize().double().T) < ONE_ROUNDING


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("size", [32, 576])
def test_norms(tokens, size):
    x, residual, weight = (
        random(tokens, size).bfloat16(),
        random(tokens, size, seed=1).bfloat16(),
        random(size).bfloat16(),
    )
    exact = reference.rms_norm(x.double(), weight.double(), EPS)
    assert relative_error(native_parts.rms_norm(NATIVE, x, weight, EPS), exact) < ONE_ROUNDING
    expected, total = reference.add_rms_norm(x, residual, weight, EPS)
    out, found = NATIVE.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(found, total) and found is residual
    assert relative_error(out, expected) < ONE_ROUNDING


@dataclasses.dataclass
class Shape:
    kv_heads: int
    group: int
    size: int
    page_size: int

    @property
    def heads(self):
        return self.kv_heads * self.group


HEADS = [Shape(3, 3, 64, 16), Shape(2, 4, 128, 32), Shape(1, 1, 32, 16), Shape(8, 2, 96, 64)]


@pytest.mark.parametrize("shape", HEADS, ids=str)
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("tokens", [1, 11, 200])
def test_heads_are_normed_turned_and_written(shape, with_norms, tokens):
    cache = torch.full((2, 20, shape.page_size, shape.kv_heads, shape.size), float("nan")).bfloat16()
    expected = cache.double()
    qkv = random(tokens, shape.heads + 2 * shape.kv_heads, shape.size).bfloat16()
    norms = [random(shape.size, seed=i).bfloat16() if with_norms else None for i in range(2)]
    angles = random(tokens, 1, shape.size // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    places = torch.randperm(20 * shape.page_size, generator=torch.Generator().manual_seed(0))[:tokens]
    out = native_parts.norm_rope_write(NATIVE, qkv, *norms, EPS, cos, sin, cache, places)
    doubles = [None if norm is None else norm.double() for norm in norms]
    exact = reference.norm_rope_write(qkv.double(), *doubles, EPS, cos.double(), sin.double(), expected, places)
    assert relative_error(out, exact) < 2 * ONE_ROUNDING
    assert torch.equal(cache.isnan(), expected.isnan())
    written = ~expected.isnan()
    assert relative_error(cache[written], expected[written]) < 2 * ONE_ROUNDING


ROWS = [(0, 1, 0), (1, 1, 17), (2, 1, 63), (3, 1, 64), (4, 40, 0), (5, 40, 30), (6, 70, 100), (7, 1, 300)]
"""Slot, tokens, position of the first."""
PAGED = [*HEADS, Shape(2, 3, 64, 4)]
"""The last has pages that hold no whole tile."""


def table(shape, slots=8, pages=40):
    """Pages of each slot, none of them twice."""
    needed = -(-400 // shape.page_size)
    order = torch.randperm(slots * needed, generator=torch.Generator().manual_seed(1))
    return order.view(slots, needed), slots * needed


def runs_and_tasks(rows):
    runs, tasks, token = [], [], 0
    for slot, count, start in rows:
        tasks.append((len(runs), 1, 0))
        runs.append((token, count, slot, start))
        token += count
    return torch.tensor(runs, dtype=torch.int32), torch.tensor(tasks, dtype=torch.int32), token


def attention_of(q, cache, pages, shape, slot, start, count, window):
    positions = torch.arange(start + count)
    places = pages[slot][positions // shape.page_size] * shape.page_size + positions % shape.page_size
    queries = positions[start:, None]
    hidden = positions > queries
    if window is not None:
        hidden |= positions <= queries - window
    mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, float("-inf"))
    return reference.prefill_attention(q.double(), cache.double(), places, mask)


@pytest.mark.parametrize("shape", PAGED, ids=str)
@pytest.mark.parametrize("window", [None, 1, 20, 100])
def test_attention_of_rows_of_every_kind(shape, window):
    pages, num_pages = table(shape)
    cache = random(2, num_pages, shape.page_size, shape.kv_heads, shape.size).bfloat16()
    runs, tasks, tokens = runs_and_tasks(ROWS)
    q = random(tokens, shape.heads, shape.size).bfloat16()
    out = native_parts.attention(NATIVE, q, cache, pages, runs, tasks, window)
    for (slot, count, start), (token, *_) in zip(ROWS, runs.tolist(), strict=True):
        own = slice(token, token + count)
        exact = attention_of(q[own], cache, pages, shape, slot, start, count, window)
        assert relative_error(out[own], exact) < 2 * ONE_ROUNDING


@pytest.mark.parametrize("window", [None, 20, 100])
def test_a_token_does_not_depend_on_those_computed_with_it(window):
    shape = HEADS[0]
    pages, num_pages = table(shape)
    cache = random(2, num_pages, shape.page_size, shape.kv_heads, shape.size).bfloat16()
    q = random(200, shape.heads, shape.size).bfloat16()
    whole = torch.tensor([(0, 200, 3, 100)], dtype=torch.int32), torch.tensor([(0, 1, 0)], dtype=torch.int32)
    pieces = [(0, 1, 3, 100), (1, 40, 3, 101), (41, 7, 3, 141), (48, 152, 3, 148)]
    apart = torch.tensor(pieces, dtype=torch.int32), torch.tensor([(i, 1, 0) for i in range(4)], dtype=torch.int32)
    out = native_parts.attention(NATIVE, q, cache, pages, *whole, window)
    assert torch.equal(out, native_parts.attention(NATIVE, q, cache, pages, *apart, window))


@pytest.mark.parametrize("shape", PAGED, ids=str)
@pytest.mark.parametrize("rows", [ROWS, [(0, 1, 0), (2, 1, 63), (7, 1, 300)], [(6, 70, 100)]], ids=len)
def test_threads_share_the_work_and_change_nothing(shape, rows):
    pages, num_pages = table(shape)
    cache = random(2, num_pages, shape.page_size, shape.kv_heads, shape.size).bfloat16()
    runs, tasks, tokens = runs_and_tasks(rows)
    q = random(tokens, shape.heads, shape.size).bfloat16()
    before = torch.get_num_threads()
    try:
        outs = []
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            outs.append(native_parts.attention(NATIVE, q, cache, pages, runs, tasks, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_only_a_rows_own_context_reaches_it():
    shape = HEADS[0]
    pages, num_pages = table(shape)
    cache = random(2, num_pages, shape.page_size, shape.kv_heads, shape.size).bfloat16()
    runs, tasks, tokens = runs_and_tasks(ROWS)
    q = random(tokens, shape.heads, shape.size).bfloat16()
    expected = native_parts.attention(NATIVE, q, cache, pages, runs, tasks, None)
    seen = torch.zeros(num_pages * shape.page_size, dtype=torch.bool)
    for slot, count, start in ROWS:
        positions = torch.arange(start + count)
        seen[pages[slot][positions // shape.page_size] * shape.page_size + positions % shape.page_size] = True
    cache.flatten(1, 2)[:, ~seen] = float("nan")
    assert torch.equal(native_parts.attention(NATIVE, q, cache, pages, runs, tasks, None), expected)


@pytest.mark.parametrize("shared", [64, 128, 256])
@pytest.mark.parametrize("shape", PAGED, ids=str)
def test_rows_that_share_a_prefix_get_what_they_would_get_alone(shape, shared):
    pages, num_pages = table(shape)
    pages[:, : shared // shape.page_size] = pages[0, : shared // shape.page_size]
    cache = random(2, num_pages, shape.page_size, shape.kv_heads, shape.size).bfloat16()
    rows = [(slot, 1, shared + extra) for slot, extra in enumerate((0, 1, 5, 70, 129, 15, 63, 64))]
    runs, alone, tokens = runs_and_tasks(rows)
    together = torch.tensor([(0, 5, shared), (5, 1, 0), (6, 2, shared)], dtype=torch.int32)
    q = random(tokens, shape.heads, shape.size).bfloat16()
    out = native_parts.attention(NATIVE, q, cache, pages, runs, together, None)
    exact = torch.cat(
        [attention_of(q[i : i + 1], cache, pages, shape, s, p, 1, None) for i, (s, _, p) in enumerate(rows)]
    )
    assert relative_error(out, exact) < 2 * ONE_ROUNDING
    assert torch.equal(out, native_parts.attention(NATIVE, q, cache, pages, runs, alone, None))


@dataclasses.dataclass
class Layer:
    attention_norm: torch.Tensor
    qkv: NativeLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: NativeLinear
    mlp_norm: torch.Tensor
    gated: NativeLinear
    down: NativeLinear


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_layers_are_their_operations_one_by_one(form, with_norms):
    shape, hidden = Shape(2, 2, 32, 16), 96
    layers = [
        Layer(
            random(hidden, seed=i).bfloat16(),
            NativeLinear(NATIVE, coded(form, 8 * 32, hidden)[0]),
            random(32, seed=i).bfloat16() if with_norms else None,
            random(32, seed=i + 9).bfloat16() if with_norms else None,
            NativeLinear(NATIVE, coded(form, hidden, 4 * 32)[0]),
            random(hidden, seed=i + 5).bfloat16(),
            NativeLinear(NATIVE, coded(form, 2 * 160, hidden)[0], gated=True),
            NativeLinear(NATIVE, coded(form, hidden, 160)[0]),
        )
        for i in range(3)
    ]
    pages, num_pages = table(shape)
    rows = [(0, 1, 20), (1, 9, 3), (2, 30, 0)]
    runs, tasks, tokens = runs_and_tasks(rows)
    positions = torch.cat([torch.arange(start, start + count) for _, count, start in rows])
    slots = torch.cat([torch.full((count,), slot) for slot, count, _ in rows])
    places = pages[slots, positions // 16] * 16 + positions % 16
    angles = random(tokens, 1, 16).repeat(1, 1, 2)
    angles = angles.cos().bfloat16(), angles.sin().bfloat16()
    kv = random(3, 2, num_pages, 16, 2, 32).bfloat16()
    x, by_one = random(tokens, hidden).bfloat16(), kv.clone()
    h, total = NativeLayers(NATIVE, layers, shape.heads, EPS)(x.clone(), angles, kv, places, pages, runs, tasks, None)
    expected = x.clone()
    out = native_parts.rms_norm(NATIVE, expected, layers[0].attention_norm, EPS)
    for index, layer in enumerate(layers):
        qkv = layer.qkv(out).view(tokens, -1, 32)
        q = native_parts.norm_rope_write(NATIVE, qkv, layer.q_norm, layer.k_norm, EPS, *angles, by_one[index], places)
        attended = native_parts.attention(NATIVE, q, by_one[index], pages, runs, tasks, None)
        out, expected = NATIVE.add_rms_norm(layer.o(attended.flatten(1)), expected, layer.mlp_norm, EPS)
        out = layer.down(layer.gated(out))
        if index < 2:
            out, expected = NATIVE.add_rms_norm(out, expected, layers[index + 1].attention_norm, EPS)
    assert torch.equal(kv, by_one)
    assert torch.equal(h, out) and torch.equal(total, expected)
