"""`treadle ps`: the live programs of a running server, one a line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from treadle.runtime.cli.options import Commands
from treadle.runtime.cli.remote import add_remote_options, doing, duration, printable, remote_of

HELP = "list the live programs of a running server"
HEADER = ("PROGRAM", "TURNS", "NODES", "AGE", "DOES")


def add_command(commands: Commands) -> None:
    """Adds `ps` to the commands."""
    parser = commands.add_parser("ps", help=HELP, description=f"{HELP[0].upper()}{HELP[1:]}, those used last first.")
    add_remote_options(parser)
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="most programs to list (default: 100)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the list."""
    listed = remote_of(args).json("/v1/programs", limit=args.limit)
    programs = listed["data"]
    if args.json:
        for program in programs:
            print(json.dumps(program))
        return 0
    rows = [HEADER, *map(_row, programs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER) - 1)]
    for row in rows:
        print(_line(row, widths))
    if listed["has_more"]:
        print(f"and more; --limit {10 * args.limit} shows them" if args.limit <= 100 else "and more")
    return 0


def _row(program: Mapping[str, Any]) -> tuple[str, ...]:
    turns, nodes = str(program["turns"]), str(program["nodes"])
    return printable(program["id"]), turns, nodes, duration(program["age_s"]), doing(program)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
