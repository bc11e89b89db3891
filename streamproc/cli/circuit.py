"""``streamproc circuit``: what pauses a task on purpose, asked of a running processor's sidecar, and changed there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

from streamproc.cli.sidecar import UrlOption, ask_sidecar, sidecar_url
from streamproc.cli.terminal import ConfigOption, JsonOption, UsageError, print_json, print_table, say
from streamproc.errors import SidecarError

app = typer.Typer(no_args_is_help=True)

TaskArgument = Annotated[
    str | None, typer.Argument(metavar="[TASK]", help="The task; may be left out where there is one only.")
]


@app.callback(epilog="Example: streamproc circuit status")
def circuit() -> None:
    """Show whether tasks are paused because too many records failed; let a task go on, or pause it by hand.

    Each replica has circuits of its own. The sidecar takes changes from its own machine only.
    """


@app.command(epilog="Example: streamproc circuit status --url http://127.0.0.1:8080 --json")
def status(
    task: Annotated[str | None, typer.Argument(metavar="[TASK]", help="The task; all of them by default.")] = None,
    *,
    url: UrlOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the circuit of each task: what opened it, and when it closes."""
    circuits = _circuits(sidecar_url(url, config))
    if task is not None:
        circuits = {task: circuits[_known(task, circuits)]}
    if as_json:
        print_json(circuits)
        return
    columns = ("task", "circuit", "bad", "decided", "openings", "closes in (s)", "reason")
    rows = [
        (
            name,
            it["state"],
            f"{it['bad']:,}",
            f"{it['decided']:,}",
            it["openings"],
            _closes_in(it),
            it["reason"] or "",
        )
        for name, it in circuits.items()
    ]
    print_table(columns, rows, right=columns[2:6], whole=("task", "circuit"), spare=("openings",))


@app.command(epilog="Example: streamproc circuit close text")
def close(
    task: TaskArgument = None, *, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Let a task go on; counting begins at zero, and the circuit opens again where records go on failing."""
    _change("close", task, sidecar_url(url, config), as_json=as_json)


@app.command("open", epilog="Example: streamproc circuit open text")
def open_(
    task: TaskArgument = None, *, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Pause a task until `circuit close`: it stays in its consumer group, and what runs is finished and committed."""
    _change("open", task, sidecar_url(url, config), as_json=as_json)


def _change(verb: str, task: str | None, url: str, *, as_json: bool) -> None:
    circuits = _circuits(url)
    name = _known(task, circuits)
    before, after = circuits[name], ask_sidecar(url, "POST", f"/tasks/{quote(name, safe='')}/circuit/{verb}")
    if as_json:
        print_json(after)
        return
    already = "already " if before["state"] == after["state"] else ""
    why = f": {after['reason']}" if after["reason"] else ""
    say(f"task {name}: the circuit is {already}{after['state']}{why}")


def _known(task: str | None, circuits: Mapping[str, Any]) -> str:
    """The task that is meant. Raises UsageError."""
    if task is None and len(circuits) == 1:
        return next(iter(circuits))
    if task is None or task not in circuits:
        problem = "say which task" if task is None else f"there is no task {task}"
        raise UsageError(f"{problem}; the tasks are: {', '.join(circuits)}")
    return task


def _closes_in(it: Mapping[str, Any]) -> str:
    if it["state"] == "closed":
        return ""
    return "never" if it["closes_in_s"] is None else f"{it['closes_in_s']:.0f}"


def _circuits(url: str) -> dict[str, Any]:
    tasks = ask_sidecar(url, "GET", "/status").get("tasks", {})
    circuits = {name: task["circuit"] for name, task in tasks.items() if "circuit" in task}
    if not circuits:
        raise SidecarError(f"what answers at {url} has no circuits; is it streamproc, and of this version?", url=url)
    return circuits
