"""`treadle run`: a workflow from a Python file, live in the terminal."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from treadle.dsl import Program
from treadle.dsl.errors import DSLError
from treadle.runtime.cli.console import note
from treadle.runtime.cli.live import watching
from treadle.runtime.cli.options import DEFAULT_MODEL, MODEL_HELP, Commands, add_engine_options
from treadle.runtime.cli.session import running
from treadle.runtime.errors import InvalidRequestError
from treadle.runtime.local import LocalRuntime

if TYPE_CHECKING:
    from treadle.runtime.recorder import Recorder

Workflow = Callable[..., Coroutine[Any, Any, Any]]


def add_command(commands: Commands) -> None:
    """Adds `run` to the command line."""
    parser = commands.add_parser(
        "run",
        help="run a workflow",
        description="Runs `async def main(...)` of a Python file. Arguments become its parameters, by their types.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a Python file with `async def main(...)`")
    parser.add_argument("arguments", nargs="*", metavar="ARG", help="the parameters of main, in order")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="M", help=f"{MODEL_HELP} (default: {DEFAULT_MODEL})")
    parser.add_argument("--json", action="store_true", help="print one JSON object: result, account and graph")
    parser.add_argument("--mermaid", action="store_true", help="print each program's graph in Mermaid's language")
    parser.add_argument("--record", metavar="TRACE.jsonl", help="append what programs did, for `treadle simulate`")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the file's workflow and prints its result and account."""
    workflow = load_workflow(args.file)
    arguments = bind_arguments(workflow, args.arguments)
    if args.record is None:
        return run_workflow(args, workflow, arguments)
    from treadle.runtime.recorder import Recorder

    return run_workflow(args, workflow, arguments, Recorder(args.record))


def run_workflow(
    args: argparse.Namespace, workflow: Workflow, arguments: Sequence[Any], recorder: Recorder | None = None
) -> int:
    """Loads the model, runs a workflow under a live view, and prints what came of it. Returns the exit code."""
    with running(args, recorder) as (runner, runtime):
        with watching(runtime, quiet=args.json):
            try:
                result = runner.run(workflow(*arguments))
                runner.run(runtime.end_programs())
            except DSLError as error:
                print(f"treadle: error: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                runner.run(runtime.end_programs())
                note("interrupted")
                if not args.json:
                    _print_accounts(_roots(runtime), sys.stderr)
                raise
        roots = _roots(runtime)
        if args.json:
            print(json.dumps(_report(args, result, roots), ensure_ascii=False))
        else:
            _print(result, roots, mermaid=args.mermaid)
    return 0


def load_workflow(path: Path) -> Workflow:
    """The `main` of a Python file. Raises `InvalidRequestError` if there is none."""
    if not path.is_file():
        raise InvalidRequestError(f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InvalidRequestError(f"{path}: this is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent.resolve()))
    spec.loader.exec_module(module)
    workflow = getattr(module, "main", None)
    if not callable(workflow) or not inspect.iscoroutinefunction(inspect.unwrap(workflow)):
        raise InvalidRequestError(f"{path}: it has no `async def main(...)`; give the workflow that name")
    return workflow  # type: ignore[no-any-return]


def bind_arguments(workflow: Workflow, given: Sequence[str]) -> list[Any]:
    """Command line words as the parameters of a workflow, converted to their annotated types."""
    signature = inspect.signature(workflow, eval_str=True)
    try:
        bound = signature.bind(*given)
    except TypeError as error:
        raise InvalidRequestError(f"main{signature}: {error}") from None
    values = []
    for name, word in bound.arguments.items():
        annotation = signature.parameters[name].annotation
        words = word if isinstance(word, tuple) else (word,)
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(Any if annotation is inspect.Parameter.empty else annotation)
            values += [adapter.validate_python(item) for item in words]
        except ValidationError as error:
            raise InvalidRequestError(f"main{signature}: {name}: {error.errors()[0]['msg']}") from None
    return values


def _report(args: argparse.Namespace, result: Any, programs: Sequence[Program]) -> dict[str, Any]:
    return {
        "model": args.model,
        "result": to_jsonable_python(result, fallback=str),
        "programs": [
            {"name": program.name, "account": program.account.to_json(), "graph": program.graph.to_json()}
            for program in programs
            if program.account is not None
        ],
    }


def _print(result: Any, programs: Sequence[Program], *, mermaid: bool) -> None:
    if result is not None:
        shown = to_jsonable_python(result, fallback=str)
        print(shown if isinstance(shown, str) else json.dumps(shown, indent=2, ensure_ascii=False))
    if mermaid:
        for program in programs:
            print(f"\n{program.graph.mermaid()}")
    _print_accounts(programs, sys.stdout)


def _print_accounts(programs: Sequence[Program], stream: TextIO) -> None:
    for program in programs:
        if program.account is not None:
            print(f"\n{program.name}", file=stream)
            for line in program.account.lines():
                print(f"  {line}", file=stream)


def _roots(runtime: LocalRuntime) -> list[Program]:
    return [program for program in runtime.programs if program.parent is None]
