"""The registry's client against a real server: what it keeps, what it sends to whom, and how it fails."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamproc.errors import RegistryError
from streamproc.formats.registry import PAUSE_S, UNKNOWN_FOR_S, Registry
from streamproc.formats.values import UnknownSchemaError
from tests.support.certificates import Authority
from tests.support.schema_registry import SchemaRegistry

SCHEMA = {"type": "record", "name": "R", "fields": []}
SECRET = "hunter2-very-secret"  # noqa: S105 - of nobody


@pytest.fixture
def server() -> Iterator[SchemaRegistry]:
    with SchemaRegistry() as server:
        yield server


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_schema_is_fetched_once(server: SchemaRegistry) -> None:
    schema_id = server.register("s-value", "AVRO", SCHEMA)
    registry = Registry(url=server.url)
    for _ in range(3):
        found = registry.by_id(schema_id)
    assert (found.id, found.kind, json.loads(found.text)) == (schema_id, "AVRO", SCHEMA)
    assert server.asked == [f"/schemas/ids/{schema_id}"]


def test_a_subject_gives_its_latest_or_the_version_that_is_named(server: SchemaRegistry) -> None:
    first, second = (server.register("a/b value", "JSON", {"title": title}) for title in ("1", "2"))
    registry = Registry(url=server.url)
    assert registry.of_subject("a/b value", None).id == second
    assert registry.of_subject("a/b value", 1).id == first
    with pytest.raises(UnknownSchemaError):
        registry.of_subject("a/b value", 3)
    assert server.asked[0] == "/subjects/a%2Fb%20value/versions/latest"


def test_what_a_schema_refers_to_comes_along_dependencies_first(server: SchemaRegistry) -> None:
    server.register("inner", "AVRO", '"inner"')
    server.register("middle", "AVRO", '"middle"', [{"name": "I", "subject": "inner", "version": 1}])
    both = [{"name": "M", "subject": "middle", "version": 1}, {"name": "I", "subject": "inner", "version": 1}]
    found = Registry(url=server.url).by_id(server.register("outer", "AVRO", '"outer"', both))
    assert list(found.references.items()) == [("I", '"inner"'), ("M", '"middle"')]


def test_schemas_that_refer_to_each_other_have_an_end(server: SchemaRegistry) -> None:
    schema_id = server.register("a", "AVRO", '"a"', [{"name": "A", "subject": "a", "version": 1}])
    with pytest.raises(UnknownSchemaError, match="refer to each other"):
        Registry(url=server.url).by_id(schema_id)


def test_an_unknown_id_is_asked_for_again_after_a_minute_only(server: SchemaRegistry) -> None:
    clock = Clock()
    registry = Registry(url=server.url, clock=clock)
    for _ in range(3):
        with pytest.raises(UnknownSchemaError):
            registry.by_id(1)
    assert len(server.asked) == 1
    server.register("s", "AVRO", SCHEMA)
    clock.now += UNKNOWN_FOR_S
    assert registry.by_id(1).id == 1


def test_after_a_failure_nothing_is_asked_for_a_moment(server: SchemaRegistry) -> None:
    clock = Clock()
    schema_id = server.register("s", "AVRO", SCHEMA)
    registry = Registry(url=server.url, clock=clock)
    server.is_down = True
    for _ in range(3):
        with pytest.raises(RegistryError, match=r"refuses /schemas/ids/1 with status 503; it is tried again"):
            registry.by_id(schema_id)
    assert len(server.asked) == 1
    server.is_down = False
    clock.now += PAUSE_S
    assert registry.by_id(schema_id).id == schema_id


@pytest.mark.parametrize(
    ("status", "hint"), [(401, "credentials"), (403, "may read"), (302, "redirects"), (429, "tried")]
)
def test_a_refusal_says_what_to_do(server: SchemaRegistry, status: int, hint: str) -> None:
    server.answers = [status]
    with pytest.raises(RegistryError, match=f"status {status}.*{hint}"):
        Registry(url=server.url).by_id(1)


def test_a_redirect_gets_no_credentials(server: SchemaRegistry) -> None:
    with SchemaRegistry() as other:
        server.redirect_to = f"{other.url}/schemas/ids/1"
        server.answers = [307]
        with pytest.raises(RegistryError, match="redirects are not followed"):
            Registry(url=server.url, username="me", password=SECRET).by_id(1)
        assert other.asked == []


def test_credentials_are_sent_and_files_are_read_anew(server: SchemaRegistry, tmp_path: Path) -> None:
    server.register("s", "AVRO", SCHEMA)
    file = tmp_path / "secret"
    file.write_text("first\n")
    for registry, expected in (
        (Registry(url=server.url, username="me", password=SECRET), f"me:{SECRET}"),
        (Registry(url=server.url, username="me", password_file=str(file)), "me:first"),
    ):
        registry.by_id(1)
        assert server.authorizations[-1] == f"Basic {base64.b64encode(expected.encode()).decode()}"
    registry = Registry(url=server.url, token_file=str(file))
    registry.by_id(1)
    file.write_text("second")
    registry.of_subject("s", None)
    assert server.authorizations[-2:] == ["Bearer first", "Bearer second"]
    file.unlink()
    with pytest.raises(RegistryError, match=r"schema_registry\.token_file: cannot read"):
        registry.of_subject("s", None)


def test_no_error_holds_a_secret(server: SchemaRegistry) -> None:
    registry = Registry(url=server.url, username="me", password=SECRET)
    server.answers = [500]
    with pytest.raises(RegistryError) as raised:
        registry.by_id(1)
    assert SECRET not in repr(raised.value) + str(raised.value.__dict__) + repr(registry)


def test_a_registry_that_is_not_there_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(
        RegistryError, match=rf"^the schema registry at http://127\.0\.0\.1:{port} cannot be asked for .*ref"
    ):
        Registry(url=f"http://127.0.0.1:{port}").by_id(1)


def test_a_registry_that_says_nothing_is_waited_for_so_long(server: SchemaRegistry) -> None:
    server.silent.set()
    with pytest.raises(RegistryError, match=r"does not answer within 0\.05 s"):
        Registry(url=server.url, timeout_s=0.05).by_id(1)


@pytest.mark.parametrize("pause_s", [0.02, 0.0])
def test_an_answer_that_drips_or_never_ends_is_cut_off(pause_s: float) -> None:
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1_000)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            try:
                while not ended.wait(pause_s):
                    connection.sendall(b" " * (1 if pause_s else 1_000_000))
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        try:
            with pytest.raises(RegistryError, match="does not answer"):
                Registry(url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3 if pause_s else 20).by_id(1)
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize(
    "answer", ["<html>", "[]", "{}", '{"schema": 5}', '{"schema": "x", "references": [{"name": 1}]}']
)
def test_what_is_no_registry_is_said_to_be_none(
    server: SchemaRegistry, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    told = answer if answer.startswith("<") else json.loads(answer)
    monkeypatch.setattr(server, "answer", lambda *_: (200, told))
    with pytest.raises(RegistryError, match="is no schema registry"):
        Registry(url=server.url).by_id(1)


def test_tls_is_checked_against_the_authority_that_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    signed = authority.sign("registry")
    with SchemaRegistry(certificate=(str(signed.certificate), str(signed.key))) as server:
        schema_id = server.register("s", "AVRO", SCHEMA)
        assert Registry(url=server.url, ca_file=str(authority.certificate)).by_id(schema_id).id == schema_id
        with pytest.raises(RegistryError, match="certificate"):
            Registry(url=server.url).by_id(schema_id)
        with pytest.raises(RegistryError, match="TLS files below schema_registry"):
            Registry(url=server.url, ca_file=str(tmp_path / "nowhere")).by_id(schema_id)


def test_a_key_with_a_passphrase_is_refused(tmp_path: Path) -> None:
    signed = Authority(tmp_path).sign("client")
    encrypted = tmp_path / "encrypted.key"
    command = ["openssl", "ec", "-aes256", "-passout", "pass:hunter2", "-in", str(signed.key), "-out", str(encrypted)]
    subprocess.run(command, check=True, capture_output=True)
    registry = Registry(url="https://127.0.0.1:1", cert_file=str(signed.certificate), key_file=str(encrypted))
    with pytest.raises(RegistryError, match="TLS files below schema_registry"):
        registry.by_id(1)
