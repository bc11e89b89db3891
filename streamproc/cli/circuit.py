"""``streamproc circuit``: what pauses a task on purpose, asked of a running processor's sidecar, and changed there."""

from __future__ import annotations

import http.client
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

import orjson
import typer

from streamproc.cli.terminal import ConfigOption, JsonOption, UsageError, print_json, print_table, say
from streamproc.errors import SettingsError, SidecarError

app = typer.Typer(no_args_is_help=True)

_TIMEOUT_S = 10.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - asked for, not listened at

TaskArgument = Annotated[
    str | None, typer.Argument(metavar="[TASK]", help="The task; may be left out where there is one only.")
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="The sidecar.", show_default="http.host and http.port of the settings"),
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
    circuits = _circuits(_sidecar(url, config))
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
    _change("close", task, _sidecar(url, config), as_json=as_json)


@app.command("open", epilog="Example: streamproc circuit open text")
def open_(
    task: TaskArgument = None, *, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False
) -> None:
    """Pause a task until `circuit close`: it stays in its consumer group, and what runs is finished and committed."""
    _change("open", task, _sidecar(url, config), as_json=as_json)


def _change(verb: str, task: str | None, url: str, *, as_json: bool) -> None:
    circuits = _circuits(url)
    name = _known(task, circuits)
    before, after = circuits[name], _ask(url, "POST", f"/tasks/{quote(name, safe='')}/circuit/{verb}")
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


def _sidecar(url: str | None, config: Path | None) -> str:
    """Where the sidecar is. Raises UsageError, SettingsError."""
    if url is not None:
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            right = False
        if not right:
            raise UsageError(f"--url is {url!r}; write it as http://HOST:PORT")
        return url.rstrip("/")
    from streamproc.settings_loading import load_settings  # noqa: PLC0415 - --help needs no pydantic

    http = load_settings(config, os.environ).http
    if not http.enabled:
        raise SettingsError(
            "the sidecar is off", setting="http.enabled", hint="switch it on, or name one with --url URL"
        )
    if http.port == 0:
        raise SettingsError(
            "the sidecar has taken any free port",
            setting="http.port",
            hint="give --url URL; the processor's log says where it answers",
        )
    host = _ANYWHERE.get(http.host, http.host)
    return f"http://[{host}]:{http.port}" if ":" in host else f"http://{host}:{http.port}"


def _circuits(url: str) -> dict[str, Any]:
    tasks = _ask(url, "GET", "/status").get("tasks", {})
    circuits = {name: task["circuit"] for name, task in tasks.items() if "circuit" in task}
    if not circuits:
        raise SidecarError(f"what answers at {url} has no circuits; is it streamproc, and of this version?", url=url)
    return circuits


def _ask(url: str, method: str, path: str) -> dict[str, Any]:
    """A request to the sidecar, and its answer. Raises SidecarError."""
    parts = urlsplit(url)
    make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    # Not urllib: a proxy in the environment is for what is far away.
    connection = make(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    try:
        # The sidecar takes a change only with a content type that no other site's form can send.
        connection.request(method, parts.path + path, headers={"Content-Type": "application/json"})
        answer = connection.getresponse()
        status_code, body = answer.status, answer.read()
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SidecarError(
            f"no sidecar answers at {url} ({why}); is the processor running there? --url names another", url=url
        ) from error
    finally:
        connection.close()
    try:
        told = orjson.loads(body)
    except ValueError:
        told = None
    if status_code == http.client.OK and isinstance(told, dict):
        return told
    detail = told.get("detail") if isinstance(told, dict) else None
    raise SidecarError(f"{url}{path} answers {status_code}: {detail or 'that is no sidecar of streamproc'}", url=url)
