"""`treadle explain PROGRAM`: what a program waits for and why, from the decisions that the scheduler took."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from treadle.runtime.cli.options import Commands
from treadle.runtime.cli.remote import add_remote_options, duration, printable, program_path, remote_of

HELP = "tell why a program of a running server waits"


def add_command(commands: Commands) -> None:
    """Adds `explain` to the commands."""
    parser = commands.add_parser("explain", help=HELP, description="Tells why a program of a running server waits.")
    parser.add_argument("program", metavar="PROGRAM", help="its id, as `treadle ps` shows it")
    add_remote_options(parser)
    parser.add_argument("--last", type=int, default=20, metavar="N", help="decisions to show (default: 20)")
    parser.add_argument("--json", action="store_true", help="print all that is known as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what is known of the program."""
    program = remote_of(args).json(program_path(args.program))
    if args.json:
        print(json.dumps(program))
        return 0
    for line in _lines(program, args.last):
        print(printable(line))
    return 0


def _lines(program: Mapping[str, Any], last: int) -> Iterator[str]:
    yield f"{program['id']}: {program['turns']} turns in {duration(program['age_s'])}, named by {program['source']}"
    yield from (f"  {sentence}" for sentence in program["why"])
    account = program["account"]
    if account is not None:
        yield (
            f"used: {account['prefilled']} prompt tokens computed, {account['cached']} from the cache, "
            f"{account['re_prefilled']} computed again; {account['decoded']} generated; "
            f"queued {account['queued_s']:.2f} s, engine {account['service_s']:.2f} s"
        )
    decisions = program["decisions"][-last:] if last > 0 else []
    if decisions:
        yield "decisions, the oldest first:"
    for decision in decisions:
        ago = duration(max(0.0, decision["ago_s"]))
        yield f"  {ago:>8} ago  {decision['action']:8} {decision['subject']}: {decision['reason']}"
