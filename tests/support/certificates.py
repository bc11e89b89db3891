"""Certificates for tests, by openssl: an authority, and what it signs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Signed:
    """A certificate and its key, in PEM; ``both`` holds the two."""

    certificate: Path
    key: Path
    both: Path


class Authority:
    """A certificate authority in a directory of its own; ``certificate`` is what those trust who trust it."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        if shutil.which("openssl") is None:
            reason = "openssl is not installed, which makes the certificates"
            if os.environ.get("STREAMPROC_REQUIRE_KAFKA") == "1":
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        self._directory = directory
        self.certificate, self._key = directory / f"{name}.pem", directory / f"{name}.key"
        _openssl(
            "req", "-x509", *_KEY, "-keyout", self._key, "-out", self.certificate, "-days", "2", "-subj", f"/CN={name}"
        )

    def sign(self, name: str, alternative: str = "IP:127.0.0.1") -> Signed:
        """A new key with its certificate; by default it is that of this machine's loopback address, and of no name."""
        folder = self._directory
        made = Signed(folder / f"{name}.pem", folder / f"{name}.key", folder / f"{name}.both.pem")
        request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternative}\n")
        _openssl("req", "-new", *_KEY, "-keyout", made.key, "-out", request, "-subj", f"/CN={name}")
        signed_by = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial")
        _openssl(
            "x509", "-req", "-in", request, *signed_by, "-days", "2", "-extfile", extensions, "-out", made.certificate
        )
        made.both.write_bytes(made.key.read_bytes() + made.certificate.read_bytes())
        return made


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
