"""The sidecar's HTTP application: probes, metrics, status, predictions, the circuits of the tasks, and reloads.

Every handler runs in the event loop and answers from memory, so that an answer takes no thread and waits for nothing;
but for predictions (``predict``), which wait for a worker, and reloads, which wait for new ones. No page loads a file
from another server (``docs``).

What changes something is for whoever has the token. Without one it is for this machine alone (whoever is on it may stop
the process anyway), and not for a page in a browser on it: no other site's form can send the content type
``application/json``, its scripts may not without our consent, and browsers add ``Origin`` to whatever a page posts. No
other site's page knows the token, which no cookie holds.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from streamproc.errors import ReloadBusyError, ReloadRefusedError
from streamproc.observe.dashboard import dashboard_routes
from streamproc.observe.docs import docs_routes
from streamproc.observe.health import Health, HealthSummary, ProcessorView
from streamproc.observe.metrics import Metrics, package_version
from streamproc.observe.predict import describe, has_token, predict_routes
from streamproc.observe.prediction import TaskInput
from streamproc.observe.status import EXAMPLE, CircuitStatus, ProcessorStatus, ReloadStatus
from streamproc.observe.trace_context import TRACEPARENT, trace_id_of
from streamproc.settings import HttpSettings

if TYPE_CHECKING:
    from streamproc.observe.tracing import Tracing

QUIET_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics", "/status"})
"""Polled every few seconds by machines, or by the dashboard: their requests are not logged."""

_JSON = "application/json"
_OK = {"ok": True, "reasons": []}
_NOT_LIVE = {"ok": False, "reasons": ["task text: records wait, and no batch was executed for 364 s"]}
_NOT_READY = {"ok": False, "reasons": ["worker 0 is starting"]}
_CLOSED = CircuitStatus(openings=1).model_dump(mode="json")
_OPEN = {
    **CircuitStatus(state="open", reason="opened by hand", openings=1).model_dump(mode="json"),
    "opened_at": "2024-05-01T12:00:30Z",
}

logger = logging.getLogger("streamproc.http")


class Refusal(BaseModel):
    """Why a request was not carried out, and what to do."""

    model_config = ConfigDict(frozen=True)

    detail: str


_REFUSALS = {
    401: "that is not the token of http.token",
    403: "without http.token only this machine may do that, and no page in a browser; use `streamproc circuit` where "
    "the processor runs",
    404: "there is no task txt; the tasks are: text",
    409: "the processor is stopping, and its tasks take nothing more",
    415: "send the header `Content-Type: application/json`, which no other site's form can send",
}
"""The sentences of the answers, which are their examples too; the one of 404 names what was asked for."""


_RELOAD_REFUSALS = {
    401: _REFUSALS[401],
    403: "without http.token only this machine may do that, and no page in a browser; use `streamproc reload` where "
    "the processor runs",
    409: "another reload is under way; how it ends is in the log and in /status",
    415: _REFUSALS[415],
    422: "its worker 0 did not become ready: the backend inference:Backend cannot be loaded",
}


Inputs = Callable[[], Mapping[str, TaskInput]]
"""What is known at the moment of the tasks that predictions are answered for, which are always the same ones."""


class _Application(FastAPI):
    """Documents predictions task by task, each with the records of its own."""

    inputs: Inputs | None = None
    guarded = False
    _described: Mapping[str, TaskInput] | None = None

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made anew where something else is known of the tasks: workers came up, or others."""
        inputs = {} if self.inputs is None else self.inputs()
        if inputs != self._described:
            self.openapi_schema = None
            describe(super().openapi(), inputs, guarded=self.guarded)
            self._described = inputs
        return super().openapi()


def create_app(
    view: ProcessorView,
    metrics: Metrics,
    settings: HttpSettings,
    *,
    inputs: Inputs | None = None,
    token: str | None = None,
    predict_token: str | None = None,
    reload: Callable[[], Awaitable[ReloadStatus]] | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application for one processor; ``Sidecar`` serves it.

    ``inputs`` knows the tasks that predictions are answered for; ``token`` is what has to be sent for them, and for
    changes from elsewhere than this machine; ``predict_token`` does for predictions, too. ``reload`` reloads the
    processor, where it has files to read. ``tracing`` makes spans of predictions.
    """
    app = _Application(
        title="streamproc",
        summary="The sidecar of a stream processor.",
        description="Health, metrics and status of one replica. Probes answer 200 or 503, with reasons.",
        version=package_version(),
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    tokens = [it for it in (token, predict_token) if it is not None]
    app.guarded = bool(tokens)
    app.include_router(_health_routes(view, settings.stalled_after_s))
    app.include_router(_observation_routes(view, metrics))
    app.include_router(_circuit_routes(view, token))
    if reload is not None:
        app.include_router(_reload_routes(reload, token))
    app.include_router(dashboard_routes(token_set=token is not None))
    app.include_router(docs_routes())
    if inputs is not None:
        app.inputs = inputs
        app.include_router(predict_routes(view.request, settings.predict, list(inputs()), tokens, tracing))
    app.add_middleware(RequestLog)
    return app


def _health_routes(view: ProcessorView, stalled_after_s: float) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.head("/livez", include_in_schema=False)
    @router.get(
        "/livez",
        summary="Whether the processor makes progress",
        description="503 when records wait and no batch was executed, or offsets wait and none was committed, for "
        f"{stalled_after_s:g} s or a little longer than a batch may take, whichever is longer. Restart it then.",
        response_model=Health,
        responses={200: _example(_OK), 503: {"model": Health, "description": "Not alive", **_example(_NOT_LIVE)}},
    )
    async def livez() -> Response:
        return _answer(view.live())

    @router.head("/readyz", include_in_schema=False)
    @router.get(
        "/readyz",
        summary="Whether the processor can take work",
        description="200 once partitions are assigned, the workers are warm and no task is stopped.",
        response_model=Health,
        responses={200: _example(_OK), 503: {"model": Health, "description": "Not ready", **_example(_NOT_READY)}},
    )
    async def readyz() -> Response:
        return _answer(view.ready())

    @router.head("/health", include_in_schema=False)
    @router.get(
        "/health",
        summary="Both probes at once",
        response_model=HealthSummary,
        responses={
            200: _example({"ok": True, "live": _OK, "ready": _OK}),
            503: {
                "model": HealthSummary,
                "description": "Not alive or not ready",
                **_example({"ok": False, "live": _OK, "ready": _NOT_READY}),
            },
        },
    )
    async def health() -> Response:
        live, ready = view.live(), view.ready()
        return _answer(HealthSummary(ok=live.ok and ready.ok, live=live, ready=ready))

    return router


def _observation_routes(view: ProcessorView, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["observation"])

    @router.head("/metrics", include_in_schema=False)
    @router.get(
        "/metrics",
        name="metrics",
        summary="Metrics for Prometheus",
        description="In the Prometheus text format, or as OpenMetrics where the Accept header asks for it.",
        response_class=Response,
        responses={
            200: {
                "description": "The metrics",
                "content": {"text/plain": {"example": 'streamproc_records_in_total{task="text"} 4224.0\n'}},
            }
        },
    )
    async def exposition(request: Request) -> Response:
        body, content_type = metrics.exposition(request.headers.get("accept", ""))
        return Response(body, media_type=content_type)

    @router.head("/status", include_in_schema=False)
    @router.get(
        "/status",
        summary="Tasks, partitions and workers",
        response_model=ProcessorStatus,
        responses={200: _example(EXAMPLE.model_dump(mode="json", by_alias=True))},
    )
    async def status() -> Response:
        return Response(view.status().model_dump_json(by_alias=True), media_type=_JSON)

    return router


def _circuit_routes(view: ProcessorView, token: str | None) -> APIRouter:
    router = APIRouter(tags=["circuit"])
    security, refusals = _security(token), _documented(_REFUSALS)

    def carry_out(request: Request, task: str, change: Callable[[str], CircuitStatus | None]) -> Response:
        if (status := _not_allowed(request, token)) is not None:
            return _refuse(status)
        if view.stopping:
            return _refuse(409)
        circuit = change(task)
        if circuit is None:
            return _refuse(404, f"there is no task {task}; the tasks are: {', '.join(view.status().tasks)}")
        return Response(circuit.model_dump_json(), media_type=_JSON)

    @router.post(
        "/tasks/{task}/circuit/close",
        name="close_circuit",
        summary="Let a task go on that was paused because too many records failed, or by hand",
        description="Counting begins at zero. 200 also where the circuit is closed already. From this machine "
        "only, or with the token; the body is not read.",
        response_model=CircuitStatus,
        responses={200: _example(_CLOSED), **refusals},
        openapi_extra=security,
    )
    async def close(task: str, request: Request) -> Response:
        return carry_out(request, task, view.close_circuit)

    @router.post(
        "/tasks/{task}/circuit/open",
        name="open_circuit",
        summary="Pause a task by hand",
        description="It takes nothing more and stays in its group; it does not go on by itself. 200 also where the "
        "circuit is open already, which then does not close by itself any more. From this machine only, or with "
        "the token; the body is not read.",
        response_model=CircuitStatus,
        responses={200: _example(_OPEN), **refusals},
        openapi_extra=security,
    )
    async def open_(task: str, request: Request) -> Response:
        return carry_out(request, task, view.open_circuit)

    return router


def _reload_routes(reload: Callable[[], Awaitable[ReloadStatus]], token: str | None) -> APIRouter:
    router = APIRouter(tags=["reload"])

    @router.post(
        "/reload",
        name="reload",
        summary="Read settings, topics and backend again, and go on with them in new workers",
        description="Answers when the new workers have taken over: that may take as long as the backend takes to load. "
        "422 where this version is refused; the one before goes on. From this machine only, or with the token; the "
        "body is not read.",
        response_model=ReloadStatus,
        responses={
            200: _example(EXAMPLE.model_dump(mode="json")["last_reload"]),
            **_documented(_RELOAD_REFUSALS),
        },
        openapi_extra=_security(token),
    )
    async def reload_(request: Request) -> Response:
        if (status := _not_allowed(request, token)) is not None:
            return _refuse(status, _RELOAD_REFUSALS[status])
        try:
            done = await reload()
        except ReloadRefusedError as error:
            return _refuse(409 if isinstance(error, ReloadBusyError) else 422, str(error))
        return Response(done.model_dump_json(), media_type=_JSON)

    return router


def _documented(refusals: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Refusal, **_example({"detail": detail})} for status, detail in refusals.items()}


def _security(token: str | None) -> dict[str, Any] | None:
    """For the OpenAPI document: either is enough, the token, or to be on this machine."""
    return None if token is None else {"security": [{"token": []}, {}]}


def _not_allowed(request: Request, token: str | None) -> int | None:
    """The status of the answer to whoever may change nothing here; None for those who may."""
    if token is not None and "authorization" in request.headers:
        if not has_token(request, token):
            return 401
    elif not _from_this_machine(request):
        return 403
    return None if request.headers.get("content-type", "").split(";")[0].strip().lower() == _JSON else 415


def _from_this_machine(request: Request) -> bool:
    """Whether a process of this machine asks, and not a page in its browser."""
    if request.client is None or "origin" in request.headers:
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    # A listener for both versions sees IPv4 as ::ffff:127.0.0.1.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _refuse(status: int, detail: str = "") -> Response:
    return Response(Refusal(detail=detail or _REFUSALS[status]).model_dump_json(), status_code=status, media_type=_JSON)


def _example(value: dict[str, object]) -> dict[str, object]:
    return {"content": {_JSON: {"example": value}}}


def _answer(health: Health | HealthSummary) -> Response:
    return Response(health.model_dump_json(), status_code=200 if health.ok else 503, media_type=_JSON)


class RequestLog:
    """ASGI middleware: one line per request, after its answer, without the query, which may hold what is secret."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and log it unless its path is quiet."""
        if scope["type"] != "http" or scope["path"] in QUIET_PATHS:
            await self._app(scope, receive, send)
            return
        status = 500  # what the server answers for an application that raises before it answers
        trace_id: str | None = None

        async def watch(message: Message) -> None:
            nonlocal status, trace_id
            if message["type"] == "http.response.start":
                status = message["status"]
                trace_id = trace_id_of(Headers(raw=message["headers"]).get(TRACEPARENT))
            await send(message)

        started = time.perf_counter()
        try:
            await self._app(scope, receive, watch)
        finally:
            elapsed_ms = (time.perf_counter() - started) * 1_000
            # Quoted again: a decoded path may hold line breaks.
            method, path = scope["method"], quote(scope["path"])
            extra = {"method": method, "path": path, "status": status, "elapsed_ms": elapsed_ms, "trace_id": trace_id}
            logger.info("%s %s %d in %.1f ms", method, path, status, elapsed_ms, extra=extra)
