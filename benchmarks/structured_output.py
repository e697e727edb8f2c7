"""Whether typed output fits its type: random schemas, a random model, and the whole engine between them.

    python benchmarks/structured_output.py --schemas 200 --seed 0

Each schema of `generators/schemas.py`, bounded, is one call: its grammar is compiled, masks every token of a model with
random weights and SmolLM2's vocabulary, and the model samples at a temperature of 1.5; nothing but the grammar keeps it
from writing nonsense. All calls are in the engine at once. A schema that the compiler cannot enforce is refused; a call
that is cut off is unfinished; every finished output must satisfy its schema, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jsonschema
import torch
from generators.schemas import bounded, schemas
from report import Report, parser

from treadle.grammar import JSONSchema, constraint_to_json
from treadle.runtime.config import cache_dir
from treadle.runtime.engine.build import build_engine
from treadle.runtime.engine.config import DTYPES, EngineConfig, torch_dtype
from treadle.runtime.engine.engine import Engine
from treadle.runtime.loading import open_model
from treadle.runtime.models.random_weights import RandomCheckpoint
from treadle.runtime.models.registry import resolve
from treadle.runtime.text.tokenizer import load_tokenizer
from treadle.scheduler import CallFinished, OpenProgram, SamplingParams, SubmitCall, TokensOut

TEMPERATURE = 1.5
MAX_TOKENS = 512
PROMPT = "Answer in JSON:"
PROGRAM = "benchmark"


@dataclass(slots=True)
class Outcome:
    """What came of a schema: `refused`, `unfinished`, `invalid` or `valid`, and the text that was written."""

    schema: dict[str, Any]
    text: str = ""
    num_tokens: int = 0
    end: CallFinished | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        assert self.end is not None
        if self.end.error is not None:
            if self.end.error != "bad_constraint":
                raise RuntimeError(self.end.message)
            return "refused"
        if self.end.reason == "length":
            return "unfinished"
        try:
            value = json.loads(self.text)
        except ValueError:
            return "invalid"
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        fits = jsonschema.Draft202012Validator(self.schema, format_checker=checker).is_valid(value)
        return "valid" if fits else "invalid"


def open_engine(model: str, config: EngineConfig) -> tuple[Engine, tuple[int, ...], tuple[int, ...]]:
    """An engine, the ids of the prompt and those that end a turn. Random weights get SmolLM2's vocabulary."""
    checkpoint, tokenizer = open_model(model, pull=True)
    if tokenizer is None:
        tokenizer = load_tokenizer(resolve("smollm2", cache_dir(), pull=True))
        checkpoint = RandomCheckpoint(replace(checkpoint.config, vocab_size=tokenizer.vocab_size))
    engine = build_engine(checkpoint, tokenizer, config)
    return engine, tuple(tokenizer.encode(PROMPT)), tokenizer.eos_token_ids


def write(
    engine: Engine, prompt: tuple[int, ...], stops: tuple[int, ...], wanted: Sequence[dict[str, Any]], seed: int
) -> list[Outcome]:
    """One call for each schema, all at once."""
    outcomes = {f"call {number}": Outcome(schema) for number, schema in enumerate(wanted)}
    sampling = SamplingParams(temperature=TEMPERATURE, stop_token_ids=stops)
    engine.apply([OpenProgram(PROGRAM)])
    events = []
    for number, (call_id, outcome) in enumerate(outcomes.items()):
        constraint = constraint_to_json(JSONSchema(json.dumps(outcome.schema), strict=True))
        params = replace(sampling, seed=seed + number)
        events += engine.apply([SubmitCall(call_id, PROGRAM, prompt, params, MAX_TOKENS, constraint=constraint)])
    while events or (stepped := engine.step()) is not None:
        for event in events or stepped or ():
            if isinstance(event, TokensOut):
                outcomes[event.call_id].text += event.text
                outcomes[event.call_id].num_tokens += len(event.token_ids)
            elif isinstance(event, CallFinished):
                outcomes[event.call_id].text += event.text
                outcomes[event.call_id].end = event
        events = []
    return list(outcomes.values())


def add_figures(report: Report, outcomes: Sequence[Outcome], seconds: float, args: argparse.Namespace) -> bool:
    """How many schemas came to what end. Returns whether every finished output was valid."""
    kinds = [outcome.kind for outcome in outcomes]
    num_tokens = sum(outcome.num_tokens for outcome in outcomes)
    common = {"batch": len(outcomes), "new_tokens": num_tokens, "seed": args.seed, "temperature": TEMPERATURE}
    for kind in ("valid", "invalid", "unfinished", "refused"):
        report.add(f"schemas_{kind}", kinds.count(kind), "schemas", **common, max_tokens=MAX_TOKENS)
    report.add("structured_tokens_per_second", num_tokens / seconds, "tokens/s", **common, compiled=True)
    for outcome, kind in zip(outcomes, kinds, strict=True):
        if kind != "valid":
            message = outcome.end.message if outcome.end is not None else ""
            print(f"{kind}: {json.dumps(outcome.schema)}: {outcome.text or message}", file=sys.stderr)
    return "invalid" not in kinds


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0])
    options.add_argument("--model", default="random:tiny-llama", help="name, path or random:SHAPE (the default)")
    options.add_argument("--dtype", choices=DTYPES, default="auto", help="element type (default: auto)")
    options.add_argument("--threads", type=int, help="threads for tensor operations (default: torch's)")
    options.add_argument("--schemas", type=int, default=200, help="how many (default: 200)")
    options.add_argument("--seed", type=int, default=0, help="of the schemas and of sampling (default: 0)")
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = str(torch_dtype(args.dtype)).removeprefix("torch.")
    common = {"model": args.model, "dtype": dtype, "threads": torch.get_num_threads(), "repeats": 1}
    report = Report(common, as_json=args.json)
    count = min(args.schemas, 20) if args.quick else args.schemas
    engine, prompt, stops = open_engine(args.model, EngineConfig(dtype=args.dtype, num_threads=args.threads))
    start = time.perf_counter()
    outcomes = write(engine, prompt, stops, [bounded(schema) for schema in schemas(count, args.seed)], args.seed)
    all_valid = add_figures(report, outcomes, time.perf_counter() - start, args)
    report.finish()
    sys.exit(0 if all_valid else 1)


if __name__ == "__main__":
    main()
