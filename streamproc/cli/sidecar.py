"""How a command finds the sidecar of a running processor, and asks it for something: ``circuit``, ``reload``."""

from __future__ import annotations

import http.client
import os
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import orjson
import typer

from streamproc.cli.terminal import UsageError
from streamproc.errors import SettingsError, SidecarError

TIMEOUT_S = 10.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - asked for, not listened at

UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="The sidecar.", show_default="http.host and http.port of the settings"),
]


def sidecar_url(url: str | None, config: Path | None) -> str:
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


def ask_sidecar(url: str, method: str, path: str, *, timeout_s: float | None = TIMEOUT_S) -> dict[str, Any]:
    """A request to the sidecar, and its answer; without a timeout it may take as long as it likes.

    Raises:
        SidecarError: nobody answers, or the request is refused.
    """
    parts = urlsplit(url)
    make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    # Not urllib: a proxy in the environment is for what is far away.
    connection = make(parts.hostname or "", parts.port, timeout=timeout_s)
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
    raise SidecarError(
        f"{url}{path} answers {status_code}: {detail or 'that is no sidecar of streamproc'}",
        url=url,
        status=status_code,
        detail=str(detail or ""),
    )
