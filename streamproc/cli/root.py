"""The root of the command line: finds a command's module when it is called, and turns errors into sentences."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.main import get_command

from streamproc.errors import StreamprocError

log = logging.getLogger(__name__)

DEBUG_VARIABLE = "STREAMPROC_DEBUG"

# In the order of a newcomer's first day. The sentences stand here, and not in the modules, so that --help imports none.
COMMANDS = {
    "demo": ("streamproc.cli.demo", "Try it: an embedded broker, a sample model, live results."),
    "check": ("streamproc.cli.check", "Check settings, backend and sample records, without Kafka."),
    "estimate": ("streamproc.cli.estimate", "Measure what batches cost in time and memory, and choose their limits."),
    "run": ("streamproc.cli.run", "Run the processor and its HTTP sidecar."),
    "stats": ("streamproc.cli.stats", "Keep statistics of all replicas, by windows of time."),
    "top": ("streamproc.cli.top", "Watch running processors: throughput, lag, batches, workers."),
    "reload": ("streamproc.cli.reload", "Bring a new version into the running processor, without a restart."),
    "topics": ("streamproc.cli.topics", "Compare declared topics with the cluster; create and change them."),
    "produce": ("streamproc.cli.produce", "Write JSON lines to a topic."),
    "consume": ("streamproc.cli.consume", "Read a topic as JSON lines."),
    "lag": ("streamproc.cli.lag", "Show how far each task is behind, in records and seconds."),
    "dlq": ("streamproc.cli.dlq", "List dead letters by fault, show one, send a selection back."),
    "replay": ("streamproc.cli.replay", "Capture records, replay them, compare results."),
    "simulate": ("streamproc.cli.simulate", "Compare batching strategies on a stream, in simulated time."),
    "circuit": ("streamproc.cli.circuit", "Show the tasks' circuits; let a task go on, or pause it."),
    "asyncapi": ("streamproc.cli.asyncapi", "Print an AsyncAPI document of tasks and topics."),
    "config": ("streamproc.cli.config", "Show the effective settings, or their JSON Schema."),
    "broker": ("streamproc.cli.broker", "Run the embedded broker in the foreground."),
}


HANDLE_SIGNALS_THEMSELVES = ("run", "stats")
"""Until its event loop does, nothing is begun that would have to be ended; what it imports takes longest."""


class LazyGroup(TyperGroup):
    """Holds stand-ins of the commands; imports the one that is called; reports its errors."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        if name is None or stand_in is None:
            return name, stand_in, rest
        module = importlib.import_module(COMMANDS[name][0])
        if name not in HANDLE_SIGNALS_THEMSELVES:
            _let_ctrl_c_raise()
        command = get_command(module.app)
        command.name = name
        # Completion is the root's; Typer would offer it for each module's own app.
        command.params = [it for it in command.params if it.name not in ("install_completion", "show_completion")]
        _speak_plainly(command, ctx)
        return name, command, rest

    def get_params(self, ctx: Any) -> Any:
        """The root's own options."""
        found = super().get_params(ctx)
        _hide_types(found)
        return found

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what it raises becomes a sentence and an exit code."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if _interrupted(error):
                raise SystemExit(128 + signal.SIGINT) from None
            # A usage error, which Typer shows with the usage, has a message of its own.
            if isinstance(error, typer.Exit | typer.Abort | SystemExit) or hasattr(error, "format_message"):
                raise
            _report(error, debug=ctx.params.get("debug", False))


class _PlainArgument(TyperArgument):
    """An argument as usage lines have always shown it: ``TOPIC`` rather than ``{TOPIC}``, and no type beside it."""

    def get_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().get_usage_pieces(ctx)]

    def display_type_rich(self, ctx: Any) -> str | None:  # noqa: ARG002 - Typer's signature
        return None


def _speak_plainly(command: Any, ctx: Any) -> None:
    """Have the help of a command, and of those below it, show arguments and flags without Typer's decorations."""
    _hide_types(command.get_params(ctx))
    for below in getattr(command, "commands", {}).values():
        _speak_plainly(below, ctx)


def _hide_types(params: Sequence[Any]) -> None:
    for param in params:
        if isinstance(param, TyperArgument):
            param.__class__ = _PlainArgument
        elif param.is_flag:
            param.metavar = ""  # --json rather than --json <bool>


def _let_ctrl_c_raise() -> None:
    """From here on Ctrl-C is an exception again, so that what was begun is ended in order."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the root of an error, whatever was made of it on the way."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        it = waiting.pop()
        if it is None or id(it) in seen:
            continue
        if isinstance(it, KeyboardInterrupt):
            return True
        seen.add(id(it))
        waiting += [it.__cause__, it.__context__, *(it.exceptions if isinstance(it, BaseExceptionGroup) else ())]
    return False


def command() -> LazyGroup:
    """The root command, to be called with ``prog_name`` and, in tests, ``args``."""
    if os.environ.get("NO_COLOR"):
        from typer import rich_utils  # noqa: PLC0415 - slow, and only for this

        rich_utils.COLOR_SYSTEM = None  # it would go on printing bold and dim
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
    if isinstance(error, StreamprocError):
        sentence, code = str(error), error.exit_code
    else:
        fault = "" if debug else " (a fault of streamproc; `streamproc --debug ...` shows where, please report it)"
        sentence, code = f"unexpected {type(error).__name__}: {error}{fault}", 1
    if _logs_are_json():
        log.error("%s", sentence, exc_info=error if debug else None)
    else:
        if debug:
            traceback.print_exception(error)
        from streamproc.cli.terminal import say_error  # noqa: PLC0415 - Rich is for when there is something to show

        say_error(sentence)
    raise SystemExit(code)


def _logs_are_json() -> bool:
    """Whether standard error carries a log of JSON lines, where a line of plain text would be lost on its reader."""
    if "streamproc.observe.logs" not in sys.modules:
        return False
    from streamproc.observe.logs import JsonFormatter  # noqa: PLC0415 - only where something has imported it

    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
