"""``streamproc topics``: the declared topics against the cluster."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamproc.cli.kafka_options import BootstrapOption, connected, find_settings, run_async
from streamproc.cli.terminal import (
    ConfigOption,
    JsonOption,
    ask,
    count_of,
    print_json,
    print_table,
    say,
)
from streamproc.errors import SettingsError, StreamprocError, TopicMissingError

if TYPE_CHECKING:
    from streamproc.broker.declared_topics import DeclaredTopic
    from streamproc.broker.interface import Admin
    from streamproc.broker.topics import Plan
    from streamproc.settings import KafkaSettings, Settings

app = typer.Typer(no_args_is_help=True)

CHANGES_NEEDED = 3

DirOption = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="The declared topics.", show_default="topics_dir of the settings"),
]
DeleteOption = Annotated[
    list[str] | None,
    typer.Option("--delete", metavar="NAME", help="Also delete this topic, with all its records; may be repeated."),
]


@app.callback(epilog="Example: streamproc topics plan")
def topics() -> None:
    """Compare the declared topics, and those that the tasks need beside them, with the cluster; create and change them.

    Records are never lost by accident: what could delete some is marked destructive, and made only on demand.
    """


@app.command(epilog="Example: streamproc topics plan --dir topics --exit-code")
def plan(
    *,
    directory: DirOption = None,
    delete: DeleteOption = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help=f"End with {CHANGES_NEEDED} where something would change.")
    ] = False,
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what `topics apply` would change; change nothing."""
    settings, kafka = find_settings(config, bootstrap_servers)
    declared = _declared(settings, directory)
    planned = run_async(lambda: _plan(settings, kafka, declared, delete or []))
    if as_json:
        print_json(planned.as_json())
    else:
        _show(planned)
    if exit_code and not planned.empty:
        raise typer.Exit(CHANGES_NEEDED)


@app.command(epilog="Example: streamproc topics apply --yes\n\nExample: streamproc topics apply --allow-destructive")
def apply(
    *,
    directory: DirOption = None,
    delete: DeleteOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    allow_destructive: Annotated[
        bool, typer.Option("--allow-destructive", help="Also make changes that can lose records.")
    ] = False,
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create and change topics so that they are as declared; ask first, on a terminal.

    Destructive changes are left out, with exit code 1, unless --allow-destructive is given.
    """
    settings, kafka = find_settings(config, bootstrap_servers)
    declared = _declared(settings, directory)
    planned = run_async(lambda: _plan(settings, kafka, declared, delete or []))
    if not as_json:
        _show(planned)
    chosen = [change for change in planned.to_apply if allow_destructive or not change.destructive]
    refused = [change for change in planned.to_apply if change not in chosen]
    if chosen and not yes:
        ask(f"Make {count_of(len(chosen), 'change')} at {kafka.bootstrap_servers}?", "nothing was changed")
    if chosen:
        run_async(lambda: _apply(kafka, planned, allow_destructive))
        say(f"{count_of(len(chosen), 'change')} made")
    if as_json:
        described = {"done": chosen, "refused": refused, "drift": planned.drift}
        print_json({name: [change.as_json() for change in changes] for name, changes in described.items()})
    if refused:
        raise StreamprocError(
            f"{count_of(len(refused), 'change')} not made, since records could be lost "
            f"({', '.join(dict.fromkeys(change.topic for change in refused))}); --allow-destructive makes them"
        )


async def _plan(
    settings: Settings | None, kafka: KafkaSettings, declared: Mapping[str, DeclaredTopic], delete: Sequence[str]
) -> Plan:
    from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - --help needs no Kafka client

    async with connected(KafkaAdmin(kafka), kafka) as admin:
        return await _compare(settings, declared, delete, admin)


async def _compare(
    settings: Settings | None, declared: Mapping[str, DeclaredTopic], delete: Sequence[str], admin: Admin
) -> Plan:
    from streamproc.broker.topics import implied_topics, plan  # noqa: PLC0415 - as above

    implied = implied_topics(settings, declared, await admin.topics()) if settings is not None else {}
    planned = await plan({**declared, **implied}, admin, delete=bool(delete))
    deletable = {change.topic for change in planned.changes if change.action == "delete"}
    with contextlib.suppress(TopicMissingError):  # as is told below
        await admin.check_topics(delete, "Delete")
    there = await admin.topics()
    kept_back = [
        f"{name} ({_why_not_deletable(name, declared, implied, there)})" for name in delete if name not in deletable
    ]
    if kept_back:
        raise StreamprocError(f"cannot delete {', '.join(kept_back)}; nothing was changed")
    # The plan offers to delete whatever is not declared; only what was named is meant.
    kept = [change for change in planned.changes if change.action != "delete" or change.topic in delete]
    return replace(planned, changes=tuple(kept))


def _why_not_deletable(
    name: str, declared: Mapping[str, DeclaredTopic], implied: Mapping[str, DeclaredTopic], there: Mapping[str, object]
) -> str:
    if name in declared:
        return f"it is declared in {declared[name].place or 'a file'}: remove that file first"
    if name in implied:
        return f"the settings use it: {implied[name].description}"
    if name not in there:
        near = difflib.get_close_matches(name, there, n=1)
        return "there is no such topic" + (f": did you mean {near[0]}?" if near else "")
    return "it is Kafka's own"


async def _apply(kafka: KafkaSettings, planned: Plan, allow_destructive: bool) -> None:
    from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - as above
    from streamproc.broker.topics import apply  # noqa: PLC0415 - as above

    async with KafkaAdmin(kafka) as admin:
        await apply(planned, admin, allow_destructive=allow_destructive)


def _declared(settings: Settings | None, directory: Path | None) -> dict[str, DeclaredTopic]:
    """The topics in the folder. Raises SettingsError where there is nothing to go by."""
    from streamproc.broker.declared_topics import load_topics  # noqa: PLC0415 - as above

    folder = directory or (settings.topics_dir if settings is not None else Path("topics"))
    if directory is not None and not directory.is_dir():
        raise SettingsError(f"there is no folder {directory}", hint="name the folder of the declared topics with --dir")
    declared = load_topics(folder)
    if settings is None and not declared:
        raise SettingsError(
            f"there are no declared topics in {folder}", hint="declare some, or name a settings file with --config"
        )
    return declared


def _show(planned: Plan) -> None:
    if planned.changes:
        print_table(("topic", "action", "change", "note"), planned.rows(), whole=("topic",), spare=("note",))
    if planned.empty:
        say("nothing to change" + (f"; {len(planned.drift)} as above are never applied" if planned.drift else ""))
