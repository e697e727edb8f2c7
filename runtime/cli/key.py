"""`treadle key`: makes an API key, and says what the server's keys file needs to know of it."""

from __future__ import annotations

import argparse
import sys

from treadle.runtime.cli.options import Commands
from treadle.runtime.server.tenants import TENANT_NAME, key_digest, new_key

HELP = "make an API key for `treadle serve --keys FILE`"


def add_command(commands: Commands) -> None:
    """Adds `key` to the commands."""
    parser = commands.add_parser("key", help=HELP, description=f"{HELP}. The file never holds the key itself.")
    parser.add_argument("tenant", nargs="?", default="default", metavar="TENANT", help="whose key it is")
    parser.add_argument("--stdin", action="store_true", help="read a key instead: at least 32 random characters")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a new key on standard error and the entry for the file on standard output: `treadle key >> keys.toml`."""
    if not TENANT_NAME.fullmatch(args.tenant):
        text = f"{args.tenant!r} is no name for a tenant: letters, digits and ._- only, at most 64"
        print(f"treadle: error: {text}", file=sys.stderr)
        return 1
    key = sys.stdin.readline().strip() if args.stdin else new_key()
    if len(key) < 32:
        print("treadle: error: a key of fewer than 32 characters could be guessed from the file", file=sys.stderr)
        return 1
    if not args.stdin:
        print(f"the key, shown only now: {key}", file=sys.stderr)
    print(f'[[tenants]]\nname = "{args.tenant}"\nkeys = ["{key_digest(key)}"]')
    return 0
