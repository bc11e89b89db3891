"""How a command finds the sidecar of a running processor, and asks it: ``circuit``, ``reload``, ``top``."""

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


def sidecar_token(file: Path | None, config: Path | None, *, from_settings: bool) -> str | None:
    """The token to send: that of a file; or that of the settings, for the sidecar that they name, if we may read it.

    Raises:
        SettingsError: the settings cannot be read.
        UsageError: the file cannot.
    """
    if file is not None:
        try:
            return file.read_text().strip()
        except (OSError, ValueError) as error:
            raise UsageError(f"--token-file {file} cannot be read: {error}") from error
    if not from_settings:
        return None  # no other host gets it
    from streamproc.runtime.startup import http_token  # noqa: PLC0415 - --help needs none of it
    from streamproc.settings_loading import load_settings  # noqa: PLC0415 - as above

    http = load_settings(config, os.environ).http
    try:
        return http_token(http)
    except SettingsError:
        return None  # a secret of the processor's, who reads it as another user; what asks for it will say so


def ask_sidecar(
    url: str, method: str, path: str, *, timeout_s: float | None = TIMEOUT_S, token: str | None = None
) -> dict[str, Any]:
    """A request to the sidecar, and its answer; without a timeout it may take as long as it likes.

    Raises:
        SidecarError: nobody answers, or the request is refused.
    """
    parts = urlsplit(url)
    make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    authorized = {} if token is None else {"Authorization": f"Bearer {token}"}
    # Not urllib: a proxy in the environment is for what is far away.
    connection = make(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        # The sidecar takes a change only with a content type that no other site's form can send.
        connection.request(method, parts.path + path, headers={"Content-Type": "application/json", **authorized})
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
