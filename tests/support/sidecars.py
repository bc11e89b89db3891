"""A sidecar for commands that ask one: it answers what the test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any


def write_settings(port: int, **http: Any) -> None:
    told = {
        "name": "app",
        "backend": {"path": "inference:Backend"},
        "tasks": {"text": {"input": {"topics": ["in"]}}},
        "http": {"port": port, **http},
    }
    Path("streamproc.yaml").write_text(json.dumps(told))


@contextlib.contextmanager
def answering(
    answers: dict[str, tuple[int, bytes]], *, port: int = 0, token: str | None = None
) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """A server with these answers by path: its port, and the requests that came, each with its content type.

    With a ``token``, for whoever sends it.
    """
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append((f"{self.command} {self.path}", self.headers.get("Content-Type", "")))
            status, body = answers.get(self.path, (404, b'{"detail":"Not Found"}'))
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                status, body = 401, b'{"detail":"send the token"}'
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815 - the names that http.server looks for

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()
