"""The client of a schema registry, by Confluent's HTTP interface, as the workers use it.

Blocks: a worker that lacks a schema has nothing else to do. What was fetched is kept for good, since a schema never
changes under its id. One request is one attempt: whoever asked tries again, with an end (``on_error.causes.registry``),
and after a failure nothing is asked for a moment, so that a batch that is split does not wait for every part.

Invariants: the credentials go to the configured host alone, no redirect is followed, and nothing that is raised or
logged holds them. No answer is read beyond 16 MiB, nor longer than ``timeout_s``.
"""

from __future__ import annotations

import base64
import http.client
import ssl
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from streamproc.errors import RegistryError
from streamproc.formats.values import RegisteredSchema, UnknownSchemaError

PAUSE_S = 1.0
"""After a failure nothing is asked for so long."""
UNKNOWN_FOR_S = 60.0
"""An id that the registry does not know is not asked for again for so long."""
MAX_UNKNOWN = 10_000
MAX_ANSWER_BYTES = 16_777_216
MAX_REFERENCES = 1_000
_CHUNK_BYTES = 65_536
_NOT_FOUND = 404


class Registry:
    """A schema registry.

    Args:
        url: Where it is, ``http`` or ``https``, perhaps with a path.
        username: For basic authentication; with ``password`` or ``password_file``.
        token: A bearer token, or ``token_file``. Files are read at each request, so that they may change.
        ca_file: Who signs its certificate; the system's authorities by default.
        cert_file: A client certificate, with ``key_file``.
        timeout_s: How long one request may take, in seconds.
        clock: Seconds that do not go back.
    """

    def __init__(
        self,
        *,
        url: str,
        username: str | None = None,
        password: str | None = None,
        password_file: str | None = None,
        token: str | None = None,
        token_file: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        timeout_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = urllib.parse.urlsplit(url)
        self._place = f"{self._url.scheme}://{self._url.netloc}{self._url.path}".rstrip("/")
        self._username, self._password, self._password_file = username, password, password_file
        self._token, self._token_file = token, token_file
        self._tls_files = (ca_file, cert_file, key_file)
        self._timeout_s = timeout_s
        self._clock = clock
        self._schemas: dict[tuple[int, bool], RegisteredSchema] = {}
        self._unknown: OrderedDict[int, float] = OrderedDict()
        self._failed: tuple[float, str] | None = None

    def by_id(self, schema_id: int, *, serialized: bool = False) -> RegisteredSchema:
        """The schema of this id; ``serialized`` asks for Protobuf as descriptors, which not every registry has.

        Raises:
            UnknownSchemaError: there is none.
            RegistryError: the registry does not answer, or refuses to.
        """
        known = self._schemas.get((schema_id, serialized))
        if known is not None:
            return known
        if self._clock() < self._unknown.get(schema_id, 0.0):
            raise UnknownSchemaError(f"{self._place} has no schema {schema_id}")
        try:
            answer = self._ask(f"/schemas/ids/{schema_id}", serialized=serialized)
        except UnknownSchemaError:
            self._unknown[schema_id] = self._clock() + UNKNOWN_FOR_S
            if len(self._unknown) > MAX_UNKNOWN:
                self._unknown.popitem(last=False)
            raise
        schema = self._schemas[schema_id, serialized] = self._schema(schema_id, answer, serialized=serialized)
        return schema

    def of_subject(self, subject: str, version: int | None, *, serialized: bool = False) -> RegisteredSchema:
        """A version of a subject's schema, the latest where none is named. Not kept here. Raises as ``by_id``."""
        name = urllib.parse.quote(subject, safe="")
        which = "latest" if version is None else str(version)
        answer = self._ask(f"/subjects/{name}/versions/{which}", serialized=serialized)
        schema_id = answer.get("id")
        if type(schema_id) is not int:
            raise self._odd(f"about subject {subject}")
        return self._schema(schema_id, answer, serialized=serialized)

    def _schema(self, schema_id: int, answer: dict[str, Any], *, serialized: bool) -> RegisteredSchema:
        references: dict[str, str] = {}
        text, kind = self._read(answer, references, (), serialized=serialized)
        return RegisteredSchema(schema_id, kind, text, references)

    def _read(
        self, answer: dict[str, Any], found: dict[str, str], path: tuple[str, ...], *, serialized: bool
    ) -> tuple[str, str]:
        """Text and kind of a schema; what it refers to is put into ``found``, before what refers to it."""
        text, kind, references = answer.get("schema"), answer.get("schemaType", "AVRO"), answer.get("references") or []
        if not (isinstance(text, str) and isinstance(kind, str) and isinstance(references, list)):
            raise self._odd("about a schema")
        for reference in references:
            if not isinstance(reference, dict):
                raise self._odd("about a schema's references")
            name, subject, version = reference.get("name"), reference.get("subject"), reference.get("version")
            if not (isinstance(name, str) and isinstance(subject, str) and type(version) is int):
                raise self._odd("about a schema's references")
            if name in path:
                raise UnknownSchemaError(f"{self._place} has schemas that refer to each other, {name} among them")
            if name not in found:
                if len(found) >= MAX_REFERENCES:
                    raise UnknownSchemaError(f"{self._place} has a schema with more than {MAX_REFERENCES} references")
                quoted = urllib.parse.quote(subject, safe="")
                told = self._ask(f"/subjects/{quoted}/versions/{version}", serialized=serialized)
                found[name] = self._read(told, found, (*path, name), serialized=serialized)[0]
        return text, kind

    # -- one request

    def _ask(self, path: str, *, serialized: bool) -> dict[str, Any]:
        now = self._clock()
        if self._failed is not None and now < self._failed[0]:
            raise RegistryError(self._failed[1], url=self._place)
        try:
            answer = self._fetch(path + ("?format=serialized" if serialized else ""), path)
        except RegistryError as error:
            self._failed = (self._clock() + PAUSE_S, str(error))
            raise
        self._failed = None
        return answer

    def _fetch(self, target: str, path: str) -> dict[str, Any]:
        until = self._clock() + self._timeout_s
        connection = self._connection()
        try:
            connection.request("GET", self._url.path.rstrip("/") + target, headers=self._headers())
            response = connection.getresponse()
            content = self._content(connection, response, until)
        except (OSError, http.client.HTTPException) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else type(error).__name__
            what = f"does not answer within {self._timeout_s:g} s" if isinstance(error, TimeoutError) else str(reason)
            raise RegistryError(
                f"the schema registry at {self._place} cannot be asked for {path}: {what}; see that it runs and that "
                f"schema_registry.url and its TLS files are right",
                url=self._place,
            ) from None
        finally:
            connection.close()
        if response.status == _NOT_FOUND:
            raise UnknownSchemaError(f"{self._place} has no {path}")
        if response.status != http.client.OK:
            hint = {
                401: "see the credentials below schema_registry",
                403: "see what the user of schema_registry may read",
            }.get(
                response.status, "redirects are not followed" if 300 <= response.status < 400 else "it is tried again"
            )
            raise RegistryError(
                f"the schema registry at {self._place} refuses {path} with status {response.status}; {hint}",
                url=self._place,
            )
        try:
            answer = orjson.loads(content)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise self._odd(f"to {path}")
        return answer

    def _content(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, until: float
    ) -> bytes:
        content = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            content += chunk
            left_s = until - self._clock()
            if len(content) > MAX_ANSWER_BYTES or left_s <= 0:
                raise TimeoutError
            if connection.sock is not None:  # which it is not any more once the answer is whole
                connection.sock.settimeout(left_s)
        return bytes(content)

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme != "https":
            return http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        ca_file, cert_file, key_file = self._tls_files
        try:
            context = ssl.create_default_context(cafile=ca_file)
            if cert_file is not None:
                # Without the function, OpenSSL would ask for the passphrase of an encrypted key on the terminal.
                context.load_cert_chain(cert_file, key_file, password=lambda: "")
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise RegistryError(
                f"the TLS files below schema_registry cannot be used: {reason}", url=self._place
            ) from None
        return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json"}
        if self._username is not None:
            password = self._secret(self._password, self._password_file, "password_file")
            credentials = base64.b64encode(f"{self._username}:{password}".encode()).decode()
            headers["Authorization"] = f"Basic {credentials}"
        elif self._token is not None or self._token_file is not None:
            headers["Authorization"] = f"Bearer {self._secret(self._token, self._token_file, 'token_file')}"
        return headers

    def _secret(self, value: str | None, file: str | None, setting: str) -> str:
        if file is None:
            return value or ""
        try:
            return Path(file).read_text("utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
            raise RegistryError(
                f"schema_registry.{setting}: cannot read {file} ({reason}); mend the path or its permissions",
                url=self._place,
            ) from None

    def _odd(self, about: str) -> RegistryError:
        return RegistryError(
            f"what answers at {self._place} is no schema registry: it gave something else {about}; mend "
            f"schema_registry.url",
            url=self._place,
        )
