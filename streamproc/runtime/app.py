"""Runs a processor as a process: event loop, signals, sidecar, exit code.

``Application`` is a processor with its sidecar, for whoever has an event loop already (the demo, tests).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Self

import uvloop

from streamproc.broker.connections import KafkaConnections
from streamproc.broker.interface import Connections
from streamproc.errors import ReloadBusyError, ReloadRefusedError, SettingsError
from streamproc.observe.logs import configure_logging
from streamproc.observe.tls import ServerTls
from streamproc.runtime.batch_plan import batch_plans
from streamproc.runtime.processor import Processor
from streamproc.runtime.reload import Load, Reloader
from streamproc.runtime.startup import (
    declared_topics,
    http_token,
    predict_token,
    task_inputs,
    warn_of_memory,
    warn_of_open_secrets,
    worker_setup,
)
from streamproc.settings import Settings

if TYPE_CHECKING:
    from streamproc.broker.declared_topics import DeclaredTopic
    from streamproc.observe.prediction import TaskInput
    from streamproc.observe.server import Sidecar
    from streamproc.observe.span_export import SpanExport

log = logging.getLogger(__name__)


class Application:
    """A processor and its sidecar. Use it as a context manager, or call ``start`` and always ``stop``."""

    def __init__(self, settings: Settings, connections: Connections | None = None, *, load: Load | None = None) -> None:
        """``load`` reads the settings again, for a reload; without there is none."""
        warn_of_memory(settings)
        warn_of_open_secrets(settings)
        self._declared = declared_topics(settings)
        self._tokens = http_token(settings.http), predict_token(settings.http)
        self._tls = ServerTls.of(settings.http)
        setup = worker_setup(settings, self._declared)
        self._spans = span_export(settings)
        self.processor = Processor(
            settings,
            setup,
            connections or KafkaConnections(settings.kafka),
            plans=batch_plans(settings, os.environ),
            tracing=None if self._spans is None else self._spans.tracing,
        )
        self.reloader = None if load is None else Reloader(self.processor, load, time.time, self._on_reloaded)
        self.sidecar: Sidecar | None = None
        """None until it is started, and where ``http.enabled`` is false."""

    async def start(self) -> None:
        """Launch the workers, bind the sidecar's port, then start the processor: probes are answered meanwhile."""
        await self.processor.launch()
        if self.processor.settings.http.enabled:
            self.sidecar = self._make_sidecar()
            await self.sidecar.start()
        await self.processor.start()

    def _make_sidecar(self) -> Sidecar:
        # FastAPI takes longer to import than all else that the start does. By now the workers do their share beside it.
        from streamproc.observe.http import create_app  # noqa: PLC0415 - as above
        from streamproc.observe.server import Sidecar  # noqa: PLC0415 - as above

        http = self.processor.settings.http
        inputs = self._inputs if http.predicts else None
        reload = None if self.reloader is None else self.reloader.reload
        token, for_predictions = self._tokens
        app = create_app(
            self.processor,
            self.processor.metrics,
            http,
            inputs=inputs,
            token=token,
            predict_token=for_predictions,
            reload=reload,
            tracing=None if self._spans is None else self._spans.tracing,
        )
        return Sidecar(app, http.host, http.port, tls=self._tls, max_connections=http.max_connections)

    def _inputs(self) -> dict[str, TaskInput]:
        return task_inputs(self.processor.settings, self._declared, self.processor.pool.declared)

    def _on_reloaded(self, settings: Settings, declared: dict[str, DeclaredTopic]) -> None:
        """A reload brought these into force."""
        _configure_logging(settings)
        self._declared = declared
        if self._tls is not None:
            try:
                self._tls.load()
            except SettingsError as error:
                log.warning("the sidecar keeps the certificate that it has: %s", error)

    async def stop(self) -> None:
        """Stop the processor, then the sidecar, which answers until the end."""
        try:
            await self.processor.stop()
        finally:
            if self.sidecar is not None:
                await self.sidecar.stop()
            if self._spans is not None:
                await self._spans.close()

    async def __aenter__(self) -> Self:
        """Start; whatever had been started is stopped if that fails."""
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self.stop()


def span_export(settings: Settings) -> SpanExport | None:
    """Where the spans of a processor go; None where there are none. ``check_tracing`` comes before."""
    if not settings.tracing.enabled or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    from streamproc.observe.span_export import SpanExport  # noqa: PLC0415 - of an extra, and only for whoever traces

    return SpanExport(settings.tracing, settings.name, os.environ)


def run_app(load: Load) -> int:
    """Run until SIGTERM or SIGINT, then drain and answer the exit code; a second signal exits at once.

    SIGHUP is a reload: ``load``, which reads the settings, reads them again. Where it says that the terminal has gone
    that the processor was started on, it is one more signal to stop; or nothing, for one that was started by nohup.

    Raises:
        StreamprocError: what kept the processor from starting, or ended it.
    """
    settings = load()
    _configure_logging(settings)
    return uvloop.run(_run(settings, load))


def _configure_logging(settings: Settings) -> None:
    configure_logging(sys.stderr, **settings.logging.model_dump())


async def _run(settings: Settings, load: Load) -> int:
    application = Application(settings, load=load)
    processor = application.processor
    asked = asyncio.Event()
    asked_at: list[float] = []

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set():
            processor.kill()
            sys.stderr.flush()
            os._exit(128 + number)
        log.info("%s: draining; once more to exit at once", number.name)
        asked_at.append(processor.clock())
        asked.set()

    hung_up = asyncio.Event()
    on_terminal = _has_terminal()
    outlives_it = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as nohup asks

    def on_hangup() -> None:
        nonlocal on_terminal
        if not on_terminal or _has_terminal():
            hung_up.set()
            return
        on_terminal = False
        if not outlives_it:
            on_signal(signal.SIGHUP)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    stopping = loop.create_task(asked.wait())
    serving = loop.create_task(_serve(application))
    reloading = loop.create_task(_reload_at_hangups(application, hung_up))
    try:
        await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            # Interrupts a start that has not come to its end; a running processor drains in ``stop`` below.
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        else:
            serving.result()
    finally:
        stopping.cancel()
        reloading.cancel()
        await application.stop()
    if asked_at:
        log.info("stopped in %.2f s", processor.clock() - asked_at[0])
    if processor.failure is not None:
        raise processor.failure
    return 0


async def _reload_at_hangups(application: Application, hung_up: asyncio.Event) -> None:
    """A reload after each; one after all that came while another was under way, since files may have changed again."""
    while application.reloader is not None:
        await hung_up.wait()
        hung_up.clear()
        log.info("SIGHUP: reloading")
        try:
            await application.reloader.reload(wait=True)
        except ReloadBusyError as error:
            log.warning("nothing is reloaded: %s", error)
        except ReloadRefusedError:
            continue  # it has said so itself


def _has_terminal() -> bool:
    """Whether this process has a terminal that could hang up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def _serve(application: Application) -> None:
    await application.start()
    await application.processor.until_ready()
    gc.collect()
    gc.freeze()
    log.info("ready")
    await application.processor.wait()
