"""`treadle models`: what can be run, and fetching it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from treadle.runtime.cli.console import pull_progress
from treadle.runtime.cli.options import Commands
from treadle.runtime.config import cache_dir
from treadle.runtime.models.random_weights import SHAPES
from treadle.runtime.models.registry import ModelListing, installed, pull

ELSEWHERE = f"""A model is also the path of a .gguf file or of a folder with config.json and safetensors,
or random:SHAPE for random weights: {", ".join(SHAPES)}."""


def add_command(commands: Commands) -> None:
    """Adds `models` to the command line."""
    parser = commands.add_parser("models", help="list models, or fetch one", description="Lists models.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(metavar="[pull]")
    fetch = actions.add_parser("pull", help="fetch a model into the cache", description="Fetches a model.")
    fetch.add_argument("name", metavar="NAME", help="a name that `treadle models` lists")
    fetch.set_defaults(run=run_pull)


def run(args: argparse.Namespace) -> int:
    """Prints every known model and where it is."""
    listings = installed(cache_dir())
    if args.json:
        entries = [{**dataclasses.asdict(listing), "path": str(listing.path)} for listing in listings]
        print(json.dumps({"models": entries, "shapes": sorted(SHAPES)}))
        return 0
    if sys.stdout.isatty():
        _print_table(listings)
    else:
        rows = [("NAME", "SIZE", "HERE", "LICENCE", "DESCRIPTION"), *map(_row, listings)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{ELSEWHERE}")
    return 0


def run_pull(args: argparse.Namespace) -> int:
    """Fetches a model, or checks the one that is there, and prints its path."""
    with pull_progress(args.name) as progress:
        path = pull(args.name, cache_dir(), progress)
    print(path)
    return 0


def _row(listing: ModelListing) -> tuple[str, str, str, str, str]:
    size = f"{listing.num_bytes / 1e6:.0f} MB"
    return listing.name, size, "yes" if listing.cached else "no", listing.licence, listing.description


def _print_table(listings: list[ModelListing]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "size", "here", "licence", "description", box=box.SIMPLE_HEAD)
    for listing in listings:
        table.add_row(*_row(listing))
    Console().print(table)
