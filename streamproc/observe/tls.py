"""TLS of the sidecar: its certificate, from files that may be renewed while it serves.

The context is made once and never replaced: a connection that is open keeps the certificate that it began with, and new
ones get the one that was loaded last.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from streamproc.certificates import load_certificate
from streamproc.errors import SettingsError
from streamproc.settings import HttpSettings


class ServerTls:
    """What the sidecar proves itself with: TLS 1.2 or newer, by ``http.tls_cert_file`` and ``http.tls_key_file``."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises SettingsError for files that cannot be used."""
        self._certificate = certificate
        self._key = key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load()

    @classmethod
    def of(cls, settings: HttpSettings) -> ServerTls | None:
        """That of the settings, or None where they name none. Raises SettingsError."""
        if settings.tls_cert_file is None or settings.tls_key_file is None:
            return None
        return cls(settings.tls_cert_file, settings.tls_key_file)

    def load(self) -> None:
        """Read the files again, for the connections to come. Raises SettingsError; then all stays as it was."""
        for path, setting in ((self._certificate, "http.tls_cert_file"), (self._key, "http.tls_key_file")):
            try:
                path.read_bytes()
            except OSError as error:
                raise SettingsError(
                    f"cannot read {path}: {error.strerror}", setting=setting, hint="correct the path or its permissions"
                ) from error
        # Tried apart first: of two files that do not fit, a context would keep the one.
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
            load_certificate(context, self._certificate, self._key, setting="http.tls_cert_file")
