"""A schema registry as tests need it: a real HTTP server that speaks the part of Confluent's interface that is used."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

HEADER_BYTES = 5


class SchemaRegistry:
    """Runs in a thread; a context manager.

    ``answers`` are statuses to answer with in place of what is right, one a request; ``asked`` are the requests' paths,
    ``authorizations`` their headers of that name. Without ``knows_serialized`` it is a registry that has Protobuf as
    text alone.
    """

    def __init__(self, *, knows_serialized: bool = True, certificate: tuple[str, str] | None = None) -> None:
        self.knows_serialized = knows_serialized
        self.asked: list[str] = []
        self.authorizations: list[str | None] = []
        self.answers: list[int] = []
        self.is_down = False
        self.redirect_to = "http://127.0.0.1:9/elsewhere"
        self.silent = threading.Event()
        self._released = threading.Event()
        self._schemas: list[dict[str, Any]] = []
        self._subjects: dict[str, list[int]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._scheme = "http" if certificate is None else "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def register(self, subject: str, kind: str, schema: Any, references: Sequence[Mapping[str, Any]] = ()) -> int:
        """Its id; as POST does it."""
        text = schema if isinstance(schema, str) else json.dumps(schema)
        self._schemas.append({"schema": text, "schemaType": kind, "references": list(references)})
        self._subjects.setdefault(subject, []).append(len(self._schemas))
        return len(self._schemas)

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, Any]:
        """Status and body of a request."""
        parts = urlsplit(target)
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        serialized = self.knows_serialized and parse_qs(parts.query).get("format") == ["serialized"]
        match method, path:
            case "POST", ["subjects", subject, "versions"]:
                asked = json.loads(body)
                kind, references = asked.get("schemaType", "AVRO"), asked.get("references", ())
                return 200, {"id": self.register(subject, kind, asked["schema"], references)}
            case "GET", ["schemas", "ids", text] if 0 < int(text) <= len(self._schemas):
                return 200, self._schema(int(text), serialized=serialized)
            case "GET", ["subjects", subject, "versions", version] if subject in self._subjects:
                ids = self._subjects[subject]
                number = len(ids) if version == "latest" else int(version)
                if 0 < number <= len(ids):
                    schema = self._schema(ids[number - 1], serialized=serialized)
                    return 200, {**schema, "id": ids[number - 1], "subject": subject, "version": number}
        return 404, {"error_code": 40403, "message": "not found"}

    def _schema(self, schema_id: int, *, serialized: bool) -> dict[str, Any]:
        schema = self._schemas[schema_id - 1]
        answer = {key: value for key, value in schema.items() if value}
        if schema["schemaType"] == "AVRO":
            del answer["schemaType"]  # as Confluent's does
        elif serialized and schema["schemaType"] == "PROTOBUF":
            answer["schema"] = base64.b64encode(self._descriptor(schema)).decode()
        return answer

    def _descriptor(self, schema: dict[str, Any]) -> bytes:
        from google.protobuf.descriptor_pb2 import FileDescriptorSet

        with tempfile.TemporaryDirectory() as folder:
            pending = [("schema.proto", schema)]
            while pending:
                name, it = pending.pop()
                file = Path(folder, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(it["schema"])
                for told in it["references"]:
                    ids = self._subjects[told["subject"]]
                    pending.append((told["name"], self._schemas[ids[told["version"] - 1] - 1]))
            command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--descriptor_set_out={folder}/set"]
            subprocess.run([*command, "schema.proto"], check=True)
            return FileDescriptorSet.FromString(Path(folder, "set").read_bytes()).file[0].SerializeToString()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                registry.asked.append(self.path)
                registry.authorizations.append(self.headers.get("Authorization"))
                if registry.silent.is_set():
                    registry._released.wait()
                    return
                status: int
                answer: Any
                if registry.is_down or registry.answers:
                    status = 503 if registry.is_down else registry.answers.pop(0)
                    answer = {"error_code": status}
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    status, answer = registry.answer(self.command, self.path, body)
                encoded = json.dumps(answer).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", registry.redirect_to)
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

            do_POST = do_GET  # noqa: N815 - as above

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as above
                """Say nothing."""

        return Handler
