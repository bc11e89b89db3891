"""How a command finds the sidecar of a running processor, and asks it: ``circuit``, ``reload``, ``top``."""

from __future__ import annotations

import http.client
import os
import re
import ssl
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import orjson
import typer

from streamproc.cli.terminal import UsageError
from streamproc.errors import SettingsError, SidecarError

TIMEOUT_S = 10.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - asked for, not listened at

_FIRST_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


class SidecarUrl(str):
    """Where a sidecar is; ``certificate`` is the file of the one that it proves itself with, where that is known."""

    __slots__ = ("certificate",)
    certificate: Path | None

    def __new__(cls, url: str, certificate: Path | None = None) -> Self:
        """The address, and the file."""
        made = super().__new__(cls, url)
        made.certificate = certificate
        return made


UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="The sidecar.", show_default="http.host and http.port of the settings"),
]


def sidecar_url(url: str | None, config: Path | None) -> SidecarUrl:
    """Where the sidecar is. Raises UsageError, SettingsError."""
    if url is not None:
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            right = False
        if not right:
            raise UsageError(f"--url is {url!r}; write it as http://HOST:PORT")
        return SidecarUrl(url.rstrip("/"))
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
    scheme = "http" if http.tls_cert_file is None else "https"
    return SidecarUrl(f"{scheme}://{f'[{host}]' if ':' in host else host}:{http.port}", http.tls_cert_file)


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

    Over https it has to prove itself with the certificate of the settings, whatever name that is for; or where they
    were not asked, with one that the system trusts, or SSL_CERT_FILE.

    Raises:
        SidecarError: nobody answers, or the request is refused.
    """
    parts = urlsplit(url)
    authorized = {} if token is None else {"Authorization": f"Bearer {token}"}
    # Not urllib: a proxy in the environment is for what is far away.
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    if parts.scheme == "https":
        trust = _trust(url.certificate if isinstance(url, SidecarUrl) else None)
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=timeout_s, context=trust)
    try:
        # The sidecar takes a change only with a content type that no other site's form can send.
        connection.request(method, parts.path + path, headers={"Content-Type": "application/json", **authorized})
        answer = connection.getresponse()
        status_code, body = answer.status, answer.read()
    except ssl.SSLCertVerificationError as error:
        raise SidecarError(
            f"the certificate of the sidecar at {url} is not trusted ({error.verify_message.rstrip('.')}); leave --url "
            f"away where the settings have its http.tls_cert_file, or set SSL_CERT_FILE to who signed it",
            url=url,
        ) from error
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise SidecarError(
            f"no sidecar answers at {url} ({why}); is the processor running there{_other_scheme(error)}? --url names "
            f"another",
            url=url,
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


def _trust(certificate: Path | None) -> ssl.SSLContext:
    """Whom to believe: of a file the first certificate in it and nobody else, else those that the system does."""
    if certificate is None:
        return ssl.create_default_context()
    try:
        found = _FIRST_CERTIFICATE.search(certificate.read_text(encoding="utf-8"))
        context = ssl.create_default_context(cadata=found[0] if found else None)
    except (OSError, ValueError, ssl.SSLError) as error:
        raise SettingsError(
            f"{certificate} holds no certificate that can be read: {error}",
            setting="http.tls_cert_file",
            hint="correct the path or its permissions, or name the sidecar with --url",
        ) from error
    # It is that very certificate that is asked for, and not one for the name that was written: 127.0.0.1, mostly.
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _other_scheme(error: Exception) -> str:
    """What somebody who answers, but not so, may be speaking."""
    if isinstance(error, ssl.SSLError):
        return ", and with TLS"
    return ", and without TLS" if isinstance(error, http.client.HTTPException | ConnectionResetError) else ""
