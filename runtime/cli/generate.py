"""`treadle generate`: one prompt, one completion or several."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from treadle.grammar import Choice, Constraint, JSONSchema, Regex
from treadle.runtime.cli.console import note, stream_text
from treadle.runtime.cli.options import (
    DEFAULT_MODEL,
    MODEL_HELP,
    Commands,
    add_engine_options,
    add_sampling_options,
    max_tokens_for,
    sampling_params,
)
from treadle.runtime.cli.session import running
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.local import Completion, LocalRuntime, Prompt
from treadle.scheduler import SamplingParams, TokenLogprob

MAX_COMPLETIONS = 1024


def add_command(commands: Commands) -> None:
    """Adds `generate` to the command line."""
    parser = commands.add_parser("generate", help="complete a prompt", description="Completes a prompt.")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to go on from (default: standard input)")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="M", help=f"{MODEL_HELP} (default: {DEFAULT_MODEL})")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message, the completion its answer")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt; implies --chat")
    parser.add_argument("--ids", action="store_true", help="the prompt is token ids, separated by spaces; print ids")
    parser.add_argument("--n", type=_count, default=1, metavar="N", help="number of completions (default: 1)")
    parser.add_argument("--logprobs", type=int, metavar="K", help="report each token's logprob and the K best")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    group = parser.add_argument_group(
        "constraint", "what the completion must be; one of these"
    ).add_mutually_exclusive_group()
    group.add_argument("--schema", type=Path, metavar="FILE", help="JSON that satisfies the JSON Schema in FILE")
    group.add_argument("--regex", metavar="R", help="text that the regular expression R matches as a whole")
    group.add_argument("--choice", action="append", metavar="TEXT", help="one of several texts; give each of them")
    add_sampling_options(parser, max_tokens=256)
    add_engine_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_COMPLETIONS:
        raise argparse.ArgumentTypeError(f"{value} is not in 1 .. {MAX_COMPLETIONS}")
    return value


def run(args: argparse.Namespace) -> int:
    """Prints what the model makes of the prompt."""
    if args.ids and (args.chat or args.system is not None):
        args.usage_error("--ids cannot be combined with --chat or --system")
    prompt, constraint = _prompt(args), _constraint(args)
    sampling = sampling_params(args, logprobs=args.logprobs)
    if args.n > 1 and args.temperature == 0:
        note("temperature is 0, so all completions will be the same; try --temperature 1")
    with running(args) as (runner, runtime):
        completions = runner.run(_complete(args, runtime, prompt, sampling, constraint))
    if args.json:
        print(json.dumps(_report(args, completions, sampling)))
    elif args.logprobs is not None:
        _print_logprobs(runtime, completions)
    return 0


def _prompt(args: argparse.Namespace) -> Prompt:
    text = args.prompt
    if text is None:
        if sys.stdin.isatty():
            args.usage_error("give a PROMPT, or pipe one in")
        text = sys.stdin.read().removesuffix("\n")
    if args.ids:
        try:
            return [int(word) for word in text.split()]
        except ValueError as error:
            raise InvalidRequestError(f"--ids wants numbers separated by spaces: {error}") from None
    if args.chat or args.system is not None:
        system = [{"role": "system", "content": args.system}] if args.system is not None else []
        return [*system, {"role": "user", "content": text}]
    return str(text)


def _constraint(args: argparse.Namespace) -> Constraint | None:
    if args.schema is not None:
        return JSONSchema(args.schema.read_text(), strict=True)
    if args.regex is not None:
        return Regex(args.regex)
    return None if args.choice is None else Choice(tuple(args.choice))


async def _complete(
    args: argparse.Namespace,
    runtime: LocalRuntime,
    prompt: Prompt,
    sampling: SamplingParams,
    constraint: Constraint | None,
) -> list[Completion]:
    """Generates, and prints text as it comes unless one object is wanted at the end."""
    if runtime.tokenizer is None and not args.ids:
        raise InvalidRequestError(f"{args.model} has no tokenizer; give token ids, with --ids")
    token_ids = runtime.encode(prompt)
    max_tokens = max_tokens_for(args, len(token_ids), runtime.max_context)
    if args.n > 1:
        completions = await runtime.generate_many(
            token_ids, sampling, max_tokens=max_tokens, constraint=constraint, n=args.n
        )
        if not args.json:
            for index, completion in enumerate(completions, 1):
                text = _shown(completion.text, completion.token_ids, as_ids=args.ids)
                stream_text(f"--- {index} of {args.n}, seed {sampling.seed + index - 1}\n{text}\n")
        return completions
    finished: list[Completion] = []
    stream = runtime.stream(token_ids, sampling, max_tokens=max_tokens, constraint=constraint)
    async with contextlib.aclosing(stream) as pieces:
        async for piece in pieces:
            if isinstance(piece, Completion):
                finished.append(piece)
            elif not args.json:
                stream_text(_shown(piece.text, piece.token_ids, as_ids=args.ids))
    if not args.json:
        stream_text("\n")
    return finished


def _shown(text: str, token_ids: tuple[int, ...], *, as_ids: bool) -> str:
    return "".join(f"{token_id} " for token_id in token_ids) if as_ids else text


def _report(args: argparse.Namespace, completions: list[Completion], sampling: SamplingParams) -> dict[str, Any]:
    entries = [_entry(completion, sampling.seed + index) for index, completion in enumerate(completions)]
    head = {"model": args.model, "prompt_tokens": completions[0].num_prompt_tokens}
    return {**head, **entries[0]} if args.n == 1 else {**head, "completions": entries}


def _entry(completion: Completion, seed: int) -> dict[str, Any]:
    entry = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "seed": seed,
        "usage": dataclasses.asdict(completion.usage),
    }
    if completion.logprobs:
        entry["logprobs"] = [dataclasses.asdict(logprob) for logprob in completion.logprobs]
    return entry


def _print_logprobs(runtime: LocalRuntime, completions: list[Completion]) -> None:
    for index, completion in enumerate(completions, 1):
        print(f"--- logprobs of {index} of {len(completions)}")
        for logprob in completion.logprobs:
            print(_logprob_line(runtime, logprob))


def _logprob_line(runtime: LocalRuntime, logprob: TokenLogprob) -> str:
    best = "  ".join(f"{_token(runtime, token_id)} {value:.3f}" for token_id, value in logprob.top)
    return f"{logprob.logprob:9.3f}  {_token(runtime, logprob.token_id):20}  {best}".rstrip()


def _token(runtime: LocalRuntime, token_id: int) -> str:
    if runtime.tokenizer is None:
        return str(token_id)
    return repr(runtime.tokenizer.decode((token_id,), skip_special=False))
