"""Loads a certificate and its key from PEM files, for whoever proves itself over TLS."""

from __future__ import annotations

import ssl
from pathlib import Path

from streamproc.errors import SettingsError


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path | None, *, setting: str) -> None:
    """Load them into a context. Raises SettingsError, of this setting, for files that cannot be used so.

    OSError of a file that cannot be read is the caller's.
    """
    try:
        # Without the function, OpenSSL would ask for the passphrase of an encrypted key on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(
            f"{certificate} and {key} are no certificate and its key: {error}",
            setting=setting,
            hint="both must be PEM, belong together, and the key have no passphrase",
        ) from error
