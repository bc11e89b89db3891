"""The fleet's view over HTTP: windows as JSON, probes, and the documents of both. Answers from memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

import orjson
from fastapi import APIRouter, FastAPI, Query, Response

from streamproc.observe.docs import docs_routes
from streamproc.observe.health import Health
from streamproc.observe.http import RequestLog
from streamproc.observe.metrics import package_version

_JSON = "application/json"
WIDTHS = {"10s": 10, "1m": 60, "1h": 3_600}
Window = Literal["10s", "1m", "1h"]


class StatsView(Protocol):
    """The application as its HTTP server sees it."""

    def live(self) -> Health:
        """Whether it goes on."""

    def ready(self) -> Health:
        """Whether its tables are those of its partitions."""

    def windows(self, *, width_s: int, last: int, task: str | None) -> dict[str, Any]:
        """The newest windows of a width, and how far each partition is read."""


def create_app(view: StatsView) -> FastAPI:
    """The application for one stats process; ``Sidecar`` serves it."""
    app = FastAPI(
        title="streamproc stats",
        summary="The statistics of a fleet of processors.",
        description="From the metrics topics, of the partitions that this process reads.",
        version=package_version(),
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.include_router(_routes(view))
    app.include_router(docs_routes())
    app.add_middleware(RequestLog)
    return app


def _routes(view: StatsView) -> APIRouter:
    router = APIRouter()

    @router.get(
        "/stats",
        summary="The newest windows, of the fleet, of each task and of each replica",
        description="Times are milliseconds, memory is in bytes; `docs/stats.md` has every field.",
        response_class=Response,
        responses={200: {"description": "The windows, the newest first", "content": {_JSON: {}}}},
    )
    async def stats(
        window: Annotated[Window, Query(description="How long the windows are.")] = "1m",
        last: Annotated[int, Query(ge=1, le=1_000, description="How many of them.")] = 10,
        task: Annotated[str | None, Query(description="Of this task alone.")] = None,
    ) -> Response:
        return _json(view.windows(width_s=WIDTHS[window], last=last, task=task))

    @router.get("/livez", summary="Whether the process goes on", response_model=Health)
    async def livez() -> Response:
        return _probe(view.live())

    @router.get("/readyz", summary="Whether it has its partitions and their windows", response_model=Health)
    async def readyz() -> Response:
        return _probe(view.ready())

    return router


def _probe(health: Health) -> Response:
    return _json(health.model_dump(), 200 if health.ok else 503)


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status_code=status, media_type=_JSON)
