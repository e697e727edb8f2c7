"""Whether a tenant can tell by the time what another one has asked: its TTFT on that one's prompts, and on unseen ones.

    python benchmarks/tenant_isolation.py --model smollm2

Alice asks a prompt of random tokens. Then Bob asks the same prompt, and one of the same length that nobody has asked,
in an order drawn by lot. The two samples of his seconds to the first token are compared by Mann and Whitney's test
(1947): `p_value` is the probability of samples that differ as much if their distributions are the same. As a control,
Alice asks her own prompt again, and an unseen one: that difference must be found, or none could be.

It ends with an error if a token of one tenant was cached for the other.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import torch
from live.server import first_token_s, running_server
from report import Parameter, Report, parser

from treadle.runtime.engine.config import DTYPES, torch_dtype
from treadle.runtime.loading import open_model
from treadle.runtime.server.tenants import key_digest, new_key

LENGTH = 256
ROUNDS = 200


def mann_whitney(one: Sequence[float], other: Sequence[float]) -> float:
    """The two-sided p-value of the U test, by the normal approximation; for samples of 20 and more."""
    ranked = sorted((value, index < len(one)) for index, value in enumerate((*one, *other)))
    rank_sum, ties, start = 0.0, 0, 0
    while start < len(ranked):
        end = start
        while end < len(ranked) and ranked[end][0] == ranked[start][0]:
            end += 1
        rank_sum += (start + 1 + end) / 2 * sum(is_one for _, is_one in ranked[start:end])
        ties += (end - start) ** 3 - (end - start)
        start = end
    n, m, total = len(one), len(other), len(ranked)
    u = rank_sum - n * (n + 1) / 2
    deviation = math.sqrt(n * m / 12 * (total + 1 - ties / (total * (total - 1))))
    return math.erfc(max(0.0, abs(u - n * m / 2) - 0.5) / deviation / math.sqrt(2)) if deviation else 1.0


class Tenants:
    """Two tenants of one server."""

    def __init__(
        self, client: aiohttp.ClientSession, url: str, keys: dict[str, str], vocabulary: range, length: int
    ) -> None:
        self._client = client
        self._url = url
        self._keys = keys
        self._vocabulary = vocabulary
        self._length = length
        self._random = random.Random(0)
        self.cached_across = 0

    def prompt(self) -> list[int]:
        """One that nobody has asked."""
        return self._random.choices(self._vocabulary, k=self._length)

    async def ask(self, tenant: str, prompt: Sequence[int]) -> tuple[float, int]:
        """Seconds to the first token, and cached tokens."""
        headers = {"Authorization": f"Bearer {self._keys[tenant]}"}
        return await first_token_s(self._client, self._url, prompt, headers)

    async def round(self, asks_again: str) -> tuple[float, float]:
        """Seconds on a prompt that Alice has asked, and on an unseen one, for the tenant that asks after her."""
        seen = self.prompt()
        await self.ask("alice", seen)
        prompts = {"seen": seen, "unseen": self.prompt()}
        seconds = {}
        for kind in self._random.sample(sorted(prompts), 2):
            seconds[kind], cached = await self.ask(asks_again, prompts[kind])
            if asks_again == "bob":
                self.cached_across += cached
        return seconds["seen"], seconds["unseen"]


async def measure(args: argparse.Namespace, report: Report, rounds: int) -> None:
    """Both comparisons. Raises `SystemExit` if anything was cached across tenants."""
    vocabulary = range(open_model(args.model, pull=True)[0].config.vocab_size)
    keys = {"alice": new_key(), "bob": new_key()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "keys.toml")
        file.write_text("".join(f'[[tenants]]\nname = "{n}"\nkeys = ["{key_digest(k)}"]\n' for n, k in keys.items()))
        flags = ["--keys", str(file), "--threads", str(args.threads), "--dtype", args.dtype]
        async with running_server(args.model, flags) as server, aiohttp.ClientSession() as client:
            tenants = Tenants(client, server.url, keys, vocabulary, args.length)
            for tenant in ("alice", "bob"):
                for _ in range(3):
                    await tenants.ask(tenant, tenants.prompt())
            for asks_again in ("bob", "alice"):
                pairs = [await tenants.round(asks_again) for _ in range(rounds)]
                add_figures(report, asks_again, [seen for seen, _ in pairs], [unseen for _, unseen in pairs])
    report.add("tokens_cached_across_tenants", tenants.cached_across, "tokens")
    if tenants.cached_across:
        raise SystemExit("a tenant's tokens were cached for another one")


def add_figures(report: Report, asks_again: str, seen: Sequence[float], unseen: Sequence[float]) -> None:
    """Of a tenant that asks after Alice."""
    who: dict[str, Parameter] = {"asks_again": asks_again}
    report.add("ttft_seen_by_alice", 1e3 * statistics.median(seen), "ms", **who)
    report.add("ttft_unseen", 1e3 * statistics.median(unseen), "ms", **who)
    report.add("p_value", mann_whitney(seen, unseen), "", **who)


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="smollm2", help="name, path or random:SHAPE (default: smollm2)")
    options.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a prompt (default: {LENGTH})")
    options.add_argument("--rounds", type=int, default=ROUNDS, help=f"prompts of each kind (default: {ROUNDS})")
    options.add_argument("--dtype", choices=DTYPES, default="auto", help="element type (default: auto)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for tensor operations")
    args = options.parse_args()
    rounds = 20 if args.quick else args.rounds
    common: dict[str, Parameter] = {"model": args.model, "threads": args.threads, "rounds": rounds}
    common |= {"dtype": str(torch_dtype(args.dtype)).removeprefix("torch.")}
    common |= {"batch": 1, "prompt_tokens": args.length, "new_tokens": 1}
    report = Report(common, as_json=args.json)
    asyncio.run(measure(args, report, rounds))
    report.finish()


if __name__ == "__main__":
    main()
