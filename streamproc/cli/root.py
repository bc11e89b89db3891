"""The root of the command line: finds a command's module when it is called, and turns errors into sentences."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from streamproc.errors import StreamprocError

DEBUG_VARIABLE = "STREAMPROC_DEBUG"

# In the order of a newcomer's first day. The sentences stand here, and not in the modules, so that --help imports none.
COMMANDS = {
    "demo": ("streamproc.cli.demo", "Try it: an embedded broker, a sample model, live results."),
    "check": ("streamproc.cli.check", "Check settings, backend and sample records, without Kafka."),
    "run": ("streamproc.cli.run", "Run the processor and its HTTP sidecar."),
    "topics": ("streamproc.cli.topics", "Compare declared topics with the cluster; create and change them."),
    "produce": ("streamproc.cli.produce", "Write JSON lines to a topic."),
    "consume": ("streamproc.cli.consume", "Read a topic as JSON lines."),
    "lag": ("streamproc.cli.lag", "Show how far each task is behind, in records and seconds."),
    "config": ("streamproc.cli.config", "Show the effective settings, or their JSON Schema."),
    "broker": ("streamproc.cli.broker", "Run the embedded broker in the foreground."),
}


class LazyGroup(TyperGroup):
    """Holds stand-ins of the commands; imports the one that is called; reports its errors."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        if name is None or stand_in is None:
            return name, stand_in, rest
        module = importlib.import_module(COMMANDS[name][0])
        command = get_command(module.app)
        command.name = name
        # Completion is the root's; Typer would offer it for each module's own app.
        command.params = [it for it in command.params if it.name not in ("install_completion", "show_completion")]
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what it raises becomes a sentence and an exit code."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error, which Typer shows with the usage
                raise
            _report(error, debug=ctx.params.get("debug", False))
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def command() -> LazyGroup:
    """The root command, to be called with ``prog_name`` and, in tests, ``args``."""
    app = typer.Typer(
        cls=LazyGroup,
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="Example: streamproc demo",
        help="Stream records from Kafka through a model and back: windowed batches, a supervised pool, nothing lost.",
    )
    app.callback(invoke_without_command=True)(_root)
    group = cast("LazyGroup", get_command(app))
    for name, (_, summary) in COMMANDS.items():
        # A name and a summary are all that help, completion and suggestions ask for.
        group.commands[name] = TyperCommand(name=name, help=summary)
    return group


def _root(
    ctx: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show the traceback of an error.")
    ] = False,
) -> None:
    if version:
        from importlib import metadata  # noqa: PLC0415 - only for this

        try:
            typer.echo(f"streamproc {metadata.version('streamproc')}")
        except metadata.PackageNotFoundError:
            typer.echo("streamproc (from its sources, not installed)")
        raise typer.Exit
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"  # for the processes that a command starts
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)


def _report(error: BaseException, *, debug: bool) -> NoReturn:
    """Say on standard error what went wrong, and end with the error's exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader of our output has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    if debug:
        traceback.print_exception(error)
    from streamproc.cli.terminal import say_error  # noqa: PLC0415 - Rich is for when there is something to show

    if isinstance(error, StreamprocError):
        say_error(str(error))
        raise SystemExit(error.exit_code)
    say_error(
        f"unexpected {type(error).__name__}: {error}"
        + ("" if debug else " (a fault of streamproc; `streamproc --debug ...` shows where, please report it)")
    )
    raise SystemExit(1)
