"""What lower precision costs: logits, best tokens and perplexity against float32 with full weights, on real text.

    python benchmarks/quality.py --model smollm2

The text is given to the model as it is, in windows that share nothing, and each form of the same checkpoint predicts
every next token of it. By default it is English, code and Markdown by turns, from Python's documentation and library
and this project's pages: `text` in the figures, a hash of the tokens, tells when those have changed. Logits are
compared less their mean, which no probability depends on. A best token is *clear* if float32 puts it `CLEAR` logits
above the next.

All forms are in bfloat16: full weights, codes as torch multiplies them, and where `native.c` runs both with its
operations; those multiply codes in two ways, one for up to 8 tokens at a time, as in decoding, so both are measured.
`BOUNDS` were written down before anything was measured; the exit code is 1 if one is broken. They hold for codes where
the checkpoint stores them, and they are the same numbers as the full weights. Others are rounded: figures, no bounds.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pydoc_data.topics
import statistics
import sys
import tarfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from report import Report, parser
from torch import Tensor

from treadle.kernels.codes import Int4Matrix, Int8Matrix
from treadle.kernels.int4 import can_multiply_int4
from treadle.runtime.engine.attention import GatheredAttention
from treadle.runtime.engine.config import EngineConfig
from treadle.runtime.engine.device import open_device
from treadle.runtime.engine.layout import lay_out
from treadle.runtime.engine.native import find_native
from treadle.runtime.engine.native_attention import NativeAttention
from treadle.runtime.engine.state import DeviceState
from treadle.runtime.loading import open_model
from treadle.runtime.models.checkpoint import Checkpoint
from treadle.runtime.models.config import Weights
from treadle.runtime.models.decoder import load_decoder
from treadle.runtime.text.tokenizer import Tokenizer
from treadle.scheduler import Row

TOKENS, WINDOW = 20_000, 512
PAGE_SIZE = 16
CLEAR = 0.25
FEW = 8
"""Most tokens at a time that `native.c` multiplies with codes as they are."""
PROJECT = Path(__file__).parents[1]
COMPARED_AT_ONCE = 128
"""Positions whose logits are compared together: each has as many as the vocabulary."""

AT_LEAST, AT_MOST = "at_least", "at_most"
BOUNDS = {
    "top1_agreement": (AT_LEAST, 98.0),
    "clear_top1_agreement": (AT_LEAST, 99.5),
    "logit_error": (AT_MOST, 2.0),
    "perplexity_ratio": (AT_MOST, 1.01),
}
"""What bfloat16 may cost if the weights are the same, in the units of the figures."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a checkpoint is computed: its weights, by what, and how many tokens at a time."""

    weights: Weights
    native: bool
    at_once: int
    is_same: bool
    """Whether its weights are those of the checkpoint."""


class Reader:
    """A decoder that reads windows of text, through the attention of the engine."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, form: Form, window: int) -> None:
        native = find_native(checkpoint.config, EngineConfig(dtype="bfloat16")) if form.native else None
        self._device = open_device("cpu", native)
        self._decoder = load_decoder(
            checkpoint, dtype, self._device.torch_device, ops=self._device.ops, weights=form.weights, native=native
        )
        self._at_once = form.at_once
        pages = -(-window // PAGE_SIZE)
        self._state = DeviceState(checkpoint.config, dtype, pages, PAGE_SIZE, 1, window, self._device)
        self._state.page_table[0] = torch.arange(pages)

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """`[T, vocab_size]`: what is expected after each token of a window."""
        self._state.token_pool[0, : len(token_ids)] = token_ids
        starts = range(0, len(token_ids), self._at_once)
        return torch.cat([self._step(start, min(self._at_once, len(token_ids) - start)) for start in starts])

    def _step(self, start: int, count: int) -> Tensor:
        rows = [Row("window", slot=0, start=start, count=count, sample=False)]
        layout, window = lay_out(rows, self._state, self._device), self._decoder.config.sliding_window
        attention = (
            NativeAttention(self._state, rows, layout, window)
            if self._decoder.native_layers is not None
            else GatheredAttention(self._state, rows, layout, self._decoder.dtype, window)
        )
        return self._decoder.forward(layout.token_ids, attention, torch.arange(count))


@dataclass(slots=True)
class Cost:
    """Sums over positions of how the logits of a form differ from those of float32.

    The logits' error is the root mean square of what differs, in percent of that of the logits.
    """

    positions: int = 0
    squared_error: float = 0.0
    squared_logits: float = 0.0
    largest_error: float = 0.0
    agreeing: int = 0
    clear: int = 0
    clear_agreeing: int = 0
    divergence: float = 0.0
    log_likelihood: float = 0.0

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Counts `[T, vocab_size]` logits before the `[T]` tokens that come."""
        two_best = reference.topk(2, -1)
        is_clear = two_best.values[:, 0] - two_best.values[:, 1] > CLEAR
        agrees = logits.argmax(-1) == two_best.indices[:, 0]
        centred = reference - reference.mean(-1, keepdim=True)
        error = logits - logits.mean(-1, keepdim=True) - centred
        expected, found = reference.log_softmax(-1), logits.log_softmax(-1)
        self.positions += len(targets)
        self.squared_error += float(error.square().mean(-1).sum())
        self.squared_logits += float(centred.square().mean(-1).sum())
        self.largest_error = max(self.largest_error, float(error.abs().max()))
        self.agreeing += int(agrees.sum())
        self.clear += int(is_clear.sum())
        self.clear_agreeing += int((agrees & is_clear).sum())
        self.divergence += float((expected.exp() * (expected - found)).sum())
        self.log_likelihood += float(found.gather(1, targets[:, None]).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_likelihood / self.positions)

    def figures(self, reference_perplexity: float) -> Iterator[tuple[str, float, str]]:
        """Names, values and units."""
        yield "top1_agreement", 100 * self.agreeing / self.positions, "%"
        yield "clear_top1_agreement", 100 * self.clear_agreeing / max(self.clear, 1), "%"
        yield "logit_error", 100 * math.sqrt(self.squared_error / self.squared_logits), "%"
        yield "largest_logit_error", self.largest_error, "logits"
        yield "kl_divergence", self.divergence / self.positions, "nats"
        yield "perplexity", self.perplexity, ""
        yield "perplexity_ratio", self.perplexity / reference_perplexity, "x"


def default_texts() -> list[str]:
    """English, code and Markdown that is wherever this program is."""
    english = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    modules = [module.__file__ for module in (argparse, statistics, tarfile, textwrap) if module.__file__]
    pages = [
        PROJECT / f"{name}.md" for name in ("docs/architecture", "docs/scheduling", "docs/tutorial", "CONTRIBUTING")
    ]
    code, markdown = ("\n\n".join(Path(path).read_text("utf-8") for path in paths) for paths in (modules, pages))
    return [english, code, markdown]


def windows(texts: Sequence[str], tokenizer: Tokenizer, size: int) -> Iterator[Tensor]:
    """Windows of `size` tokens of each text by turns, until one ends; with a BOS if the model wants one."""
    begin = [tokenizer.bos_token_id] if tokenizer.add_bos and tokenizer.bos_token_id is not None else []
    length = size - len(begin)
    token_ids = [tokenizer.encode(text) for text in texts]
    for start in range(0, min(map(len, token_ids)) - length + 1, length):
        for ids in token_ids:
            yield torch.tensor(begin + list(ids[start : start + length]))


def forms(checkpoint: Checkpoint, window: int) -> Iterator[Form]:
    """What is compared."""
    stored = [checkpoint.codes(name) for name in checkpoint.names() if name.endswith("_proj.weight")]
    in_4_bits = all(isinstance(matrix, Int4Matrix) for matrix in stored)
    in_8_bits = all(isinstance(matrix, Int8Matrix) for matrix in stored)
    yield Form("full", native=False, at_once=window, is_same=True)
    if can_multiply_int4(torch.device("cpu"), torch.bfloat16):
        yield Form("int4-only", native=False, at_once=window, is_same=in_4_bits)
    if find_native(checkpoint.config, EngineConfig(dtype="bfloat16")) is not None:
        yield Form("full", native=True, at_once=window, is_same=True)
        for at_once in (window, FEW):
            yield Form("int4", native=True, at_once=at_once, is_same=in_4_bits)
            if not in_4_bits:  # there 8 bits are those 4
                yield Form("int8", native=True, at_once=at_once, is_same=in_8_bits)


def measure(checkpoint: Checkpoint, text: Sequence[Tensor], report: Report) -> list[str]:
    """Reports what each form costs. Returns the bounds that are broken, in words."""
    window = len(text[0])
    reference = Reader(checkpoint, torch.float32, Form("full", native=False, at_once=window, is_same=True), window)
    readers = {form: Reader(checkpoint, torch.bfloat16, form, window) for form in forms(checkpoint, window)}
    exact, costs = Cost(), {form: Cost() for form in readers}
    for token_ids in text:
        expected, targets = reference.logits(token_ids)[:-1], token_ids[1:]
        add_in_parts(exact, expected, expected, targets)
        for form, cost in costs.items():
            add_in_parts(cost, expected, readers[form].logits(token_ids)[:-1], targets)
    report.add("perplexity", exact.perplexity, "", dtype="float32", weights="full", by="torch", at_once=window)
    broken = []
    for form, cost in costs.items():
        by = "native.c" if form.native else "torch"
        for figure, value, unit in cost.figures(exact.perplexity):
            bound = dict([BOUNDS[figure]]) if figure in BOUNDS and form.is_same else {}
            row = {"dtype": "bfloat16", "weights": form.weights, "by": by, "at_once": form.at_once}
            report.add(figure, value, unit, **row, **bound)
            if value < bound.get(AT_LEAST, value) or value > bound.get(AT_MOST, value):
                kind, limit = BOUNDS[figure]
                where = f"weights {form.weights} by {by}, {form.at_once} tokens at once"
                broken.append(f"{where}: {figure} is {value:.4g}, not {kind.replace('_', ' ')} {limit:g}")
    return broken


def add_in_parts(cost: Cost, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
    parts = (torch.split(whole, COMPARED_AT_ONCE) for whole in (reference, logits, targets))
    for part in zip(*parts, strict=True):
        cost.add(*part)


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2", help="name or path (default: smollm2)")
    options.add_argument("--text", type=Path, metavar="FILE", help="what to read (default: docs and library of Python)")
    options.add_argument("--tokens", type=int, default=TOKENS, help=f"how much of it (default: {TOKENS:,})")
    options.add_argument("--threads", type=int, help="threads for tensor operations (default: torch's)")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    checkpoint, tokenizer = open_model(args.model, pull=True)
    if tokenizer is None:
        sys.exit(f"{args.model} has no tokenizer, so it cannot read text; give a model that has one")
    size = min(64 if args.quick else WINDOW, checkpoint.config.max_context)
    count = 3 if args.quick else -(-args.tokens // size)
    texts = [args.text.read_text("utf-8")] if args.text else default_texts()
    text = list(islice(windows(texts, tokenizer, size), count))
    if not text:
        sys.exit(f"the text has less than {size} tokens; give a longer one")
    digest = hashlib.sha256(str(list(chain(*(window.tolist() for window in text)))).encode()).hexdigest()[:8]
    common = {"model": args.model, "text": digest, "tokens": size * len(text), "window": size}
    report = Report({**common, "threads": torch.get_num_threads()}, as_json=args.json)
    broken = measure(checkpoint, text, report)
    report.finish()
    # So few tokens as in a quick run say nothing.
    if broken and not args.quick:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
