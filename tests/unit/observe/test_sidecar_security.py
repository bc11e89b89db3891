"""The sidecar as a server: TLS, certificates that are renewed, and clients that ask for nothing, or for too much."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from streamproc.errors import SettingsError
from streamproc.observe.health import ProcessorView
from streamproc.observe.http import create_app
from streamproc.observe.metrics import Metrics
from streamproc.observe.server import MAX_HEAD_BYTES, Sidecar
from streamproc.observe.status import EXAMPLE, CircuitStatus, ReloadStatus
from streamproc.observe.tls import ServerTls
from streamproc.runtime import app
from streamproc.settings import HttpSettings, Settings
from streamproc.testing import MemoryBroker
from tests.support.asyncs import wait_until
from tests.support.certificates import Authority, Signed
from tests.support.commands import Streamproc, in_this_process
from tests.support.sidecars import write_settings


def an_app() -> Any:
    view = Mock(spec=ProcessorView)
    view.stopping = False
    view.status.return_value = EXAMPLE
    view.close_circuit.return_value = view.open_circuit.return_value = CircuitStatus(openings=1)

    async def reload() -> ReloadStatus:
        assert EXAMPLE.last_reload is not None
        return EXAMPLE.last_reload

    return create_app(view, Metrics(), HttpSettings(), reload=reload)


@contextlib.contextmanager
def serving(tls: ServerTls | None = None, **limits: Any) -> Iterator[int]:
    """A sidecar in a loop of its own: its port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make() -> Sidecar:
        made = Sidecar(an_app(), "127.0.0.1", 0, tls=tls, **limits)
        await made.start()
        return made

    sidecar = asyncio.run_coroutine_threadsafe(make(), loop).result(20)
    try:
        yield sidecar.port
    finally:
        asyncio.run_coroutine_threadsafe(sidecar.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def streamproc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Streamproc:
    monkeypatch.chdir(tmp_path)

    return in_this_process(capsys)


# -- TLS


def certified(signed: Signed) -> dict[str, str]:
    return {"tls_cert_file": str(signed.certificate), "tls_key_file": str(signed.key)}


def serial(port: int, authority: Authority) -> str:
    """That of the certificate which the sidecar shows."""
    context = ssl.create_default_context(cafile=authority.certificate)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        shown = secured.getpeercert()
    assert shown is not None
    return str(shown["serialNumber"])


def test_https_is_answered_and_http_is_not(authority: Authority) -> None:
    signed = authority.sign("sidecar")
    tls = ServerTls(signed.certificate, signed.key)
    assert tls.context.minimum_version is ssl.TLSVersion.TLSv1_2
    with serving(tls) as port:
        verify = ssl.create_default_context(cafile=authority.certificate)
        assert httpx.get(f"https://127.0.0.1:{port}/status", verify=verify).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/status")


def test_commands_ask_over_tls_by_the_certificate_of_the_settings(authority: Authority, streamproc: Streamproc) -> None:
    # For a name, and asked at 127.0.0.1: it is the certificate that counts.
    signed, other = authority.sign("sidecar", "DNS:sidecar.example"), authority.sign("other")
    with serving(ServerTls(signed.certificate, signed.key)) as port:
        write_settings(port, **certified(signed))
        code, out, err = streamproc("circuit", "status", "--json")
        assert (code, err) == (0, "")
        assert set(json.loads(out)) == set(EXAMPLE.tasks)
        assert streamproc("circuit", "open", next(iter(EXAMPLE.tasks)))[0] == 0
        assert streamproc("reload")[0] == 0
        # Of the same authority, but not the one.
        write_settings(port, **certified(other))
        code, out, err = streamproc("circuit", "status")
        assert (code, out) == (1, "")
        assert f"the certificate of the sidecar at https://127.0.0.1:{port} is not trusted" in " ".join(err.split())
        write_settings(port)
        code, _, err = streamproc("circuit", "status")
        assert code == 1
        assert "is the processor running there, and without TLS?" in " ".join(err.split())
    with serving() as port:
        write_settings(port, **certified(signed))
        code, _, err = streamproc("circuit", "status")
        assert code == 1
        assert "is the processor running there, and with TLS?" in " ".join(err.split())


def test_a_command_with_an_address_trusts_what_the_system_does(
    authority: Authority, streamproc: Streamproc, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = authority.sign("sidecar")
    with serving(ServerTls(signed.certificate, signed.key)) as port:
        asked = ("circuit", "status", "--url", f"https://127.0.0.1:{port}")
        code, _, err = streamproc(*asked)
        assert code == 1
        assert "is not trusted" in err
        assert "SSL_CERT_FILE" in err
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        assert streamproc(*asked)[0] == 0
        code, _, err = streamproc(*asked[:-1], f"https://localhost:{port}")
        assert code == 1
        assert "localhost" in err


def test_a_renewed_certificate_is_shown_once_it_is_loaded_and_a_broken_one_never(authority: Authority) -> None:
    first, second = authority.sign("first"), authority.sign("second")
    tls = ServerTls(first.certificate, first.key)
    with serving(tls) as port:
        before = serial(port, authority)
        first.certificate.write_bytes(second.certificate.read_bytes())
        with pytest.raises(SettingsError, match=r"http\.tls_cert_file: .* are no certificate and its key"):
            tls.load()
        assert serial(port, authority) == before
        first.key.write_bytes(second.key.read_bytes())
        tls.load()
        assert serial(port, authority) != before


def test_a_reload_of_the_processor_takes_the_renewed_certificate(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(app, "configure_logging", lambda *_, **__: None)
    first, second = authority.sign("first"), authority.sign("second")
    settings = Settings.model_validate(
        {
            "name": "app",
            "backend": {"path": "inference:Backend"},
            "tasks": {"main": {"input": {"topics": ["in"]}}},
            "http": certified(first),
        }
    )

    async def made() -> app.Application:
        return app.Application(settings, MemoryBroker())

    application = asyncio.run(made())
    with serving(application._tls) as port:
        before = serial(port, authority)
        first.certificate.write_bytes(second.certificate.read_bytes())
        application._on_reloaded(settings, {})
        assert "the sidecar keeps the certificate that it has: http.tls_cert_file: " in caplog.text
        assert serial(port, authority) == before
        first.key.write_bytes(second.key.read_bytes())
        application._on_reloaded(settings, {})
        assert serial(port, authority) != before


def test_files_that_are_no_certificate_are_named(tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for settings, told in (
        (
            {"tls_cert_file": tmp_path / "none.pem", "tls_key_file": nonsense},
            r"http\.tls_cert_file: cannot read .*none",
        ),
        ({"tls_cert_file": nonsense, "tls_key_file": tmp_path / "none.pem"}, r"http\.tls_key_file: cannot read .*none"),
        ({"tls_cert_file": nonsense, "tls_key_file": nonsense}, r"http\.tls_cert_file: .* no certificate and its key"),
    ):
        with pytest.raises(SettingsError, match=told):
            ServerTls.of(HttpSettings(**settings))
    assert ServerTls.of(HttpSettings()) is None


# -- limits


def connect(port: int, sent: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    made.sendall(sent)
    return made


def ended(connection: socket.socket) -> bool:
    """Whether the other side has closed it, now or within the time of the socket."""
    try:
        while connection.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


HEAD = b"POST /reload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HT",
        HEAD + b"Content-Length: 1000000\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a second head", "an answer before the body"],
)
def test_a_client_that_does_not_come_to_the_point_is_cut_off(sent: bytes) -> None:
    with serving(head_timeout_s=0.3) as port, connect(port, sent) as connection:
        began = time.monotonic()
        assert ended(connection)
        assert time.monotonic() - began < 5


def test_a_client_that_drips_is_cut_off_like_one_that_is_silent() -> None:
    with serving(head_timeout_s=0.3) as port, connect(port, b"GET /livez HTTP/1.1\r\n") as connection:
        sent = 0

        def drips() -> bool:
            nonlocal sent
            try:
                connection.sendall(b"X-%d: 1\r\n" % sent)
            except OSError:
                return True
            sent += 1
            return False

        wait_until(drips, "the connection is cut", deadline_s=10)
        assert sent > 3


def test_a_request_that_takes_long_is_not_cut_off() -> None:
    answered = threading.Event()

    async def slow() -> ReloadStatus:
        await asyncio.to_thread(answered.wait, 10)
        assert EXAMPLE.last_reload is not None
        return EXAMPLE.last_reload

    slow_app = create_app(Mock(spec=ProcessorView), Metrics(), HttpSettings(), reload=slow)

    async def main() -> None:
        sidecar = Sidecar(slow_app, "127.0.0.1", 0, head_timeout_s=0.1)
        await sidecar.start()
        async with httpx.AsyncClient() as client:
            asked = asyncio.ensure_future(
                client.post(f"{sidecar.url}/reload", headers={"Content-Type": "application/json"})
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(asked), 0.5)
            answered.set()
            assert (await asked).status_code == 200
        await sidecar.stop()

    asyncio.run(main())


def test_where_all_places_are_taken_the_oldest_that_asks_for_nothing_goes_and_probes_are_answered() -> None:
    with serving(max_connections=20) as port, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(port)) for _ in range(60)]
        assert httpx.get(f"http://127.0.0.1:{port}/status").status_code == 200
        for connection in silent[:40]:
            connection.settimeout(5)
            assert ended(connection)
        for connection in silent[-10:]:
            connection.settimeout(0.01)
            assert not ended(connection)


@pytest.mark.parametrize("path", ["/reload", "/tasks/text/circuit/open", "/tasks/text/circuit/close"])
@pytest.mark.parametrize("length", [b"Content-Length: 1000000000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_nobody_reads_does_not_fill_the_memory(path: str, length: bytes) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n%s\r\n\r\n" % (
        path.encode(),
        length,
    )
    part = b"10000\r\n" + b"x" * 65_536 + b"\r\n" if b"chunked" in length else b"x" * 65_536
    with serving(head_timeout_s=0.3) as port, connect(port, head) as connection:
        connection.settimeout(5)
        sent = 0
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 5:
                connection.sendall(part)
                sent += len(part)
        # It was answered at once, and cut off when the time for another request was over.
        assert time.monotonic() - began < 5
        assert httpx.get(f"http://127.0.0.1:{port}/status").status_code == 200


def test_headers_without_end_are_refused() -> None:
    with serving() as port, connect(port, b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Much: ") as connection:
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 100 * MAX_HEAD_BYTES:
                connection.sendall(b"x" * 1_024)
                sent += 1_024
        # What was on its way counts as sent.
        assert sent < 100 * MAX_HEAD_BYTES
        assert httpx.get(f"http://127.0.0.1:{port}/status").status_code == 200
