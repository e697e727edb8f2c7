"""Options that several subcommands share, and what they become."""

from __future__ import annotations

import argparse
import secrets
from typing import TypeAlias, cast

from treadle.runtime.engine.config import DEVICES, DTYPES, DeviceName, DType, EngineConfig
from treadle.runtime.models.config import WEIGHTS, Weights
from treadle.scheduler import SamplingParams

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a subcommand adds itself."""

DEFAULT_MODEL = "smollm2"
MODEL_HELP = "a known name (see `treadle models`), a .gguf file, a model folder, or random:SHAPE"


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds what sets up the engine."""
    group = parser.add_argument_group("engine")
    group.add_argument("--device", choices=DEVICES, default="cpu", help="where the model runs (default: cpu)")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="element type of weights and KV (default: auto)")
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="auto",
        help="which are kept in codes of 4 or 8 bits (default: auto, those stored so)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads for tensor operations (default: torch's)")
    group.add_argument("--kv-pages", type=int, metavar="N", help="pages of KV, 16 tokens each (default: by memory)")
    group.add_argument(
        "--host-pages", type=int, default=0, metavar="N", help="pages of KV in a second tier of memory (default: 0)"
    )
    group.add_argument("--max-context", type=int, metavar="N", help="most tokens of a call (default: the model's)")
    group.add_argument(
        "--learned", metavar="FILE", help="keep in FILE, for the next run, how long tools take and outputs are"
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The configuration that the engine options ask for. Raises `InvalidRequestError` for one that cannot be."""
    return EngineConfig(
        device=cast(DeviceName, args.device),
        dtype=cast(DType, args.dtype),
        weights=cast(Weights, args.weights),
        num_pages=args.kv_pages,
        host_pages=args.host_pages,
        max_context=args.max_context,
        learned=args.learned,
        num_threads=args.threads,
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Adds what chooses the tokens; `max_tokens` is the default."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the best")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K most likely tokens; 0 keeps all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the most likely P of the mass")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop what is below P times the best")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same tokens (default: random)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"most tokens to generate (default: {max_tokens}, if they fit)"
    )
    group.set_defaults(default_max_tokens=max_tokens)


def sampling_params(args: argparse.Namespace, *, logprobs: int | None = None) -> SamplingParams:
    """What the sampling options ask for. The engine checks the values."""
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=secrets.randbits(31) if args.seed is None else args.seed,
        stop=tuple(args.stop),
        logprobs=logprobs,
    )


def max_tokens_for(args: argparse.Namespace, num_prompt_tokens: int, max_context: int) -> int:
    """The number that was asked for, or the default cut down to what the context has room for."""
    if args.max_tokens is not None:
        return int(args.max_tokens)
    return max(1, min(int(args.default_max_tokens), max_context - num_prompt_tokens))
