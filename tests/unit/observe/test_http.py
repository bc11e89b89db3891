"""The sidecar: the application by itself, and served over real sockets on both event loops."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import httpx
import pytest
import uvloop
from fastapi import FastAPI

from streamproc.errors import PortTakenError, ReloadBusyError, ReloadRefusedError, SettingsError
from streamproc.observe.health import Health
from streamproc.observe.http import create_app
from streamproc.observe.metrics import Metrics
from streamproc.observe.prediction import PredictRequest
from streamproc.observe.server import Sidecar
from streamproc.observe.status import EXAMPLE, CircuitStatus, ProcessorStatus, ReloadStatus
from streamproc.settings import HttpSettings

CIRCUIT = "/tasks/text/circuit"
PATHS = ("/livez", "/readyz", "/health", "/metrics", "/status", "/openapi.json")


class StubView:
    """A processor whose health is what a test says."""

    def __init__(self) -> None:
        self.alive = Health.of()
        self.readiness = Health.of()
        self.stopping = False
        self.is_open = False

    def live(self) -> Health:
        return self.alive

    def ready(self) -> Health:
        return self.readiness

    def status(self) -> ProcessorStatus:
        return EXAMPLE

    def request(self, task: str) -> PredictRequest:
        raise AssertionError(f"no test here asks task {task} for a prediction")

    def open_circuit(self, task: str) -> CircuitStatus | None:
        return self._switch(task, is_open=True)

    def close_circuit(self, task: str) -> CircuitStatus | None:
        return self._switch(task, is_open=False)

    def _switch(self, task: str, *, is_open: bool) -> CircuitStatus | None:
        if task not in EXAMPLE.tasks:
            return None
        self.is_open = is_open
        return CircuitStatus(state="open" if is_open else "closed", openings=1)


class BrokenView(StubView):
    """A processor with a bug."""

    def status(self) -> ProcessorStatus:
        raise RuntimeError("a bug")


def an_app(view: StubView | None = None, metrics: Metrics | None = None, **options: Any) -> FastAPI:
    return create_app(view or StubView(), metrics or Metrics(), HttpSettings(), **options)


def ask(
    app: FastAPI, path: str, method: str = "GET", *, client_address: str = "127.0.0.1", **headers: str
) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=(client_address, 4711))

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://sidecar") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(go())


def change(view: StubView, path: str, *, client_address: str = "127.0.0.1", **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json", **headers}
    return ask(an_app(view), path, "POST", client_address=client_address, **headers)


def run_on(loop: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(main, 20))
    gc.collect()  # what was left open warns when it is collected, and a warning is an error


both_loops = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


def test_probes_answer_200_without_reasons_when_all_is_well() -> None:
    app = an_app()
    for path in ("/livez", "/readyz"):
        answer = ask(app, path)
        assert answer.status_code == 200
        assert answer.json() == {"ok": True, "reasons": []}
    assert ask(app, "/health").json()["ok"] is True


def test_probes_answer_503_with_reasons_each_for_itself() -> None:
    view = StubView()
    view.readiness = Health.of("worker 0 is starting")
    app = an_app(view)
    assert ask(app, "/livez").status_code == 200
    answer = ask(app, "/readyz")
    assert answer.status_code == 503
    assert answer.json() == {"ok": False, "reasons": ["worker 0 is starting"]}
    summary = ask(app, "/health")
    assert summary.status_code == 503
    assert summary.json() == {
        "ok": False,
        "live": {"ok": True, "reasons": []},
        "ready": {"ok": False, "reasons": ["worker 0 is starting"]},
    }
    view.alive, view.readiness = Health.of("stalled"), Health.of()
    assert ask(app, "/livez").status_code == 503
    assert ask(app, "/readyz").status_code == 200
    assert ask(app, "/health").status_code == 503


def test_metrics_are_served_in_the_format_that_is_asked_for() -> None:
    metrics = Metrics()
    metrics.task("text").records_in.inc(3)
    app = an_app(metrics=metrics)
    plain = ask(app, "/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'streamproc_records_in_total{task="text"} 3.0' in plain.text
    openmetrics = ask(app, "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.text.endswith("# EOF\n")


def test_status_is_the_view_as_json() -> None:
    answer = ask(an_app(), "/status")
    assert ProcessorStatus.model_validate(answer.json()) == EXAMPLE
    assert answer.json()["tasks"]["text"]["counts"]["in"] == 4224


@pytest.mark.parametrize("path", PATHS)
def test_head_answers_as_get_does(path: str) -> None:
    app = an_app()
    head, get = ask(app, path, "HEAD"), ask(app, path)
    assert head.status_code == get.status_code == 200
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize("path", PATHS)
def test_nothing_can_be_posted(path: str) -> None:
    assert ask(an_app(), path, "POST").status_code == 405


def test_the_openapi_document_describes_every_endpoint_with_an_example() -> None:
    document = ask(an_app(), "/openapi.json").json()
    assert document["info"]["title"] == "streamproc"
    circuits = {f"/tasks/{{task}}/circuit/{verb}": verb for verb in ("close", "open")}
    assert set(document["paths"]) == {*PATHS, *circuits} - {"/openapi.json"}
    for path, verb in circuits.items():
        (operation,) = document["paths"].pop(path).values()
        assert operation["operationId"] == f"{verb}_circuit"
        # 422 is FastAPI's own, of a path that cannot be read.
        assert {"200", "401", "403", "404", "409", "415"} <= set(operation["responses"])
        for status in ("200", "401", "403", "404", "409", "415"):
            assert operation["responses"][status]["content"]["application/json"]["example"]
    for path, operations in document["paths"].items():
        assert set(operations) == {"get"}
        assert operations["get"]["operationId"] == path.removeprefix("/")
        assert set(operations["get"]["responses"]) == ({"200"} if path in {"/metrics", "/status"} else {"200", "503"})
        for status, answer in operations["get"]["responses"].items():
            for content in answer["content"].values():
                assert content["example"], (path, status)
    assert "300 s" in document["paths"]["/livez"]["get"]["description"]


def test_a_circuit_is_opened_and_closed_and_the_answer_is_its_state() -> None:
    view = StubView()
    answer = change(view, f"{CIRCUIT}/open")
    assert (answer.status_code, answer.json()["state"]) == (200, "open")
    assert view.is_open
    answer = change(view, f"{CIRCUIT}/close", **{"content-type": "application/JSON; charset=utf-8"})
    assert (answer.status_code, answer.json()["state"]) == (200, "closed")
    assert not view.is_open


def test_a_circuit_of_no_task_is_404_with_the_tasks_there_are() -> None:
    answer = change(StubView(), "/tasks/txet/circuit/close")
    assert answer.status_code == 404
    assert answer.json() == {"detail": "there is no task txet; the tasks are: text"}


def test_a_processor_that_stops_changes_no_circuit() -> None:
    view = StubView()
    view.stopping = True
    answer = change(view, f"{CIRCUIT}/open")
    assert answer.status_code == 409
    assert "stopping" in answer.json()["detail"]
    assert not view.is_open


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.7", False),
        ("::ffff:10.0.0.7", False),
        ("2001:db8::1", False),
        ("testclient", False),
    ],
)
def test_only_this_machine_changes_a_circuit(address: str, allowed: bool) -> None:
    view = StubView()
    answer = change(view, f"{CIRCUIT}/open", client_address=address)
    assert answer.status_code == (200 if allowed else 403)
    assert view.is_open is allowed
    assert allowed or "this machine" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
        # A page whose name was made to stand for 127.0.0.1 may send any content type, and cannot leave this out.
        ({"origin": "http://evil.example"}, 403),
    ],
)
def test_a_page_in_a_browser_changes_no_circuit(headers: dict[str, str], status: int) -> None:
    view = StubView()
    assert change(view, f"{CIRCUIT}/open", **headers).status_code == status
    assert not view.is_open


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer open sesame"}, 200),
        ({"authorization": "bearer  open sesame", "origin": "http://sidecar"}, 200),
        ({"authorization": "Bearer open sesame!"}, 401),
        ({"authorization": "Basic open sesame"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({}, 403),
        ({"authorization": "Bearer open sesame", "content-type": "text/plain"}, 415),
    ],
)
def test_whoever_has_the_token_changes_a_circuit_from_elsewhere(headers: dict[str, str], status: int) -> None:
    view = StubView()
    app = create_app(view, Metrics(), HttpSettings(), token="open sesame")  # noqa: S106 - of a test
    headers = {"content-type": "application/json", **headers}
    answer = ask(app, f"{CIRCUIT}/open", "POST", client_address="10.0.0.7", **headers)
    assert answer.status_code == status
    assert view.is_open is (status == 200)
    operation = ask(app, "/openapi.json").json()["paths"]["/tasks/{task}/circuit/open"]["post"]
    assert operation["security"] == [{"token": []}, {}], "Swagger UI sends it"


def test_without_a_token_what_is_sent_as_one_opens_nothing() -> None:
    view = StubView()
    answer = change(view, f"{CIRCUIT}/open", client_address="10.0.0.7", authorization="Bearer None")
    assert (answer.status_code, view.is_open) == (403, False)


def test_a_circuit_is_not_changed_by_looking_at_it() -> None:
    assert ask(an_app(), f"{CIRCUIT}/open").status_code == 405


class Reloads:
    """What a reload answers, and how often it was asked for."""

    def __init__(self, refusal: ReloadRefusedError | None = None) -> None:
        self.refusal = refusal
        self.asked = 0

    async def __call__(self) -> ReloadStatus:
        self.asked += 1
        if self.refusal is not None:
            raise self.refusal
        assert EXAMPLE.last_reload is not None
        return EXAMPLE.last_reload


def post_reload(reloads: Reloads, *, client_address: str = "127.0.0.1", **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json", **headers}
    return ask(an_app(reload=reloads), "/reload", "POST", client_address=client_address, **headers)


def test_a_reload_answers_with_what_is_in_force() -> None:
    reloads = Reloads()
    answer = post_reload(reloads)
    assert (answer.status_code, answer.json()["backend_version"], answer.json()["generation"]) == (200, "2024-05", 2)
    assert reloads.asked == 1


@pytest.mark.parametrize(
    ("refusal", "status"), [(ReloadRefusedError("no module torhc"), 422), (ReloadBusyError("another one"), 409)]
)
def test_a_reload_that_is_refused_says_why(refusal: ReloadRefusedError, status: int) -> None:
    answer = post_reload(Reloads(refusal))
    assert (answer.status_code, answer.json()) == (status, {"detail": str(refusal)})


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"client_address": "10.0.0.7"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"content-type": "text/plain"}, 415),
    ],
)
def test_only_this_machine_reloads_and_no_page_in_a_browser(options: dict[str, Any], status: int) -> None:
    reloads = Reloads()
    answer = post_reload(reloads, **options)
    assert (answer.status_code, reloads.asked) == (status, 0)
    assert "reload" in answer.json()["detail"] or status == 415


def test_reloads_are_documented_where_there_are_any() -> None:
    assert "/reload" not in ask(an_app(), "/openapi.json").json()["paths"]
    operation = ask(an_app(reload=Reloads()), "/openapi.json").json()["paths"]["/reload"]["post"]
    for status in ("200", "403", "409", "415", "422"):
        assert operation["responses"][status]["content"]["application/json"]["example"]


def test_requests_are_logged_without_the_polled_ones_and_without_their_query(caplog: pytest.LogCaptureFixture) -> None:
    app = an_app()
    with caplog.at_level(logging.INFO, logger="streamproc.http"):
        for path in PATHS:
            ask(app, path)
        ask(app, "/openapi.json?token=secret")
        ask(app, "/no%0Aline")
        change(BrokenView(), "/tasks/txet/circuit/open")
    messages = [record.getMessage() for record in caplog.records if record.name == "streamproc.http"]
    assert [message.rsplit(" in ", 1)[0] for message in messages] == [
        "GET /openapi.json 200",
        "GET /openapi.json 200",
        "GET /no%0Aline 404",
        "POST /tasks/txet/circuit/open 500",
    ]


@both_loops
def test_the_sidecar_answers_over_a_socket_and_stops_cleanly(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        sidecar = Sidecar(an_app(), "127.0.0.1", 0)
        await sidecar.start()
        assert sidecar.port != 0
        assert sidecar.url == f"http://127.0.0.1:{sidecar.port}"
        async with httpx.AsyncClient(base_url=sidecar.url) as client:
            answer = await client.get("/livez")
            assert answer.json() == {"ok": True, "reasons": []}
            for path in PATHS:
                head, get = await client.head(path), await client.get(path)
                assert head.status_code == 200
                assert head.content == b""
                if path != "/metrics":  # the process metrics move between the two
                    assert head.headers["content-length"] == str(len(get.content))
            # Stops with a connection kept alive.
            await sidecar.stop()
        await sidecar.stop()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", sidecar.port)

    run_on(loop, main())


@both_loops
def test_a_taken_port_is_an_error_at_once_that_says_what_to_do(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        first = Sidecar(an_app(), "127.0.0.1", 0)
        await first.start()
        second = Sidecar(an_app(), "127.0.0.1", first.port)
        with pytest.raises(PortTakenError) as caught:
            await second.start()
        await second.stop()
        assert str(caught.value) == (
            f"http.port {first.port} is in use at 127.0.0.1; stop the process that has it, or set http.port to another "
            "port, 0 for any free one"
        )
        assert (caught.value.host, caught.value.port) == ("127.0.0.1", first.port)
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{first.url}/livez")).status_code == 200
        await first.stop()
        # The port is free again at once, though connections to it were closed a moment ago.
        await second.start()
        await second.stop()

    run_on(loop, main())


@both_loops
def test_a_request_that_never_ends_is_cancelled_after_the_grace(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        entered, cancelled = asyncio.Event(), asyncio.Event()
        app = FastAPI()

        @app.get("/forever")
        async def forever() -> None:
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        sidecar = Sidecar(app, "127.0.0.1", 0, grace_s=0)
        await sidecar.start()
        async with httpx.AsyncClient() as client:
            request = asyncio.create_task(client.get(f"{sidecar.url}/forever", timeout=None))
            await entered.wait()
            await asyncio.wait_for(sidecar.stop(), 5)
            assert cancelled.is_set()
            (outcome,) = await asyncio.gather(request, return_exceptions=True)
        assert isinstance(outcome, httpx.HTTPError) or (isinstance(outcome, httpx.Response) and outcome.is_error)

    run_on(loop, main())


def test_the_signals_stay_the_processors() -> None:
    async def main() -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        sidecar = Sidecar(an_app(), "127.0.0.1", 0)
        await sidecar.start()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        await sidecar.stop()

    run_on(asyncio.new_event_loop, main())


def test_an_ipv6_address_is_served_and_written_with_brackets() -> None:
    if not _can_bind("::1"):
        pytest.skip("this machine has no IPv6 loopback")

    async def main() -> None:
        sidecar = Sidecar(an_app(), "::1", 0)
        await sidecar.start()
        assert sidecar.url == f"http://[::1]:{sidecar.port}"
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{sidecar.url}/livez")).status_code == 200
        await sidecar.stop()

    run_on(asyncio.new_event_loop, main())


def test_a_name_is_served_at_all_its_addresses_that_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        # 192.0.2.1 is reserved for documentation: no machine has it.
        _resolve_to(monkeypatch, "192.0.2.1", "127.0.0.1", "127.0.0.2")
        sidecar = Sidecar(an_app(), "sidecar.example", 0)
        await sidecar.start()
        async with httpx.AsyncClient() as client:
            for address in ("127.0.0.1", "127.0.0.2"):
                assert (await client.get(f"http://{address}:{sidecar.port}/livez")).status_code == 200
        await sidecar.stop()

    run_on(asyncio.new_event_loop, main())


@pytest.mark.parametrize(
    ("host", "problem"), [("192.0.2.1", "is no address of this machine"), ("no such", "resolved"), ("", "resolved")]
)
def test_a_host_that_is_not_this_machines_names_the_setting(host: str, problem: str) -> None:
    async def main() -> None:
        with pytest.raises(SettingsError, match=problem) as caught:
            await Sidecar(an_app(), host, 0).start()
        assert str(caught.value).startswith(f"http.host: {host!r} ")

    run_on(asyncio.new_event_loop, main())


def test_stopping_what_never_started_does_nothing() -> None:
    asyncio.run(Sidecar(an_app(), "127.0.0.1", 0).stop())


def test_a_server_that_cannot_start_raises_instead_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no server")

        monkeypatch.setattr("streamproc.observe.server._Server.startup", fail)
        sidecar = Sidecar(an_app(), "127.0.0.1", 0)
        with pytest.raises(RuntimeError, match="no server"):
            await sidecar.start()

    run_on(asyncio.new_event_loop, main())


def _can_bind(host: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    async def getaddrinfo(_host: object, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    answer: Callable[..., Awaitable[list[tuple[object, ...]]]] = getaddrinfo
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", answer)
