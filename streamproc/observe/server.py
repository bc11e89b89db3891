"""Serves an ASGI application inside the processor's own event loop.

uvicorn's own way of running would take over the signals, set up logging, and call ``sys.exit`` when the port is taken.
Here the processor keeps its signals and its log, and the socket is bound before uvicorn hears of it, so that a port
that is taken is an error at once and nothing hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from streamproc.errors import PortTakenError, SettingsError
from streamproc.observe.tls import ServerTls

BACKLOG = 128
HEAD_TIMEOUT_S = 10.0
"""So long the head of a request may take, from the connection or the last answer on; a TLS handshake too."""
MAX_HEAD_BYTES = 32_768
"""A larger line with headers is refused with 400."""
MAX_CONNECTIONS = 2_000
_NO_SUCH_ADDRESS = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}

logger = logging.getLogger("streamproc.http")


class Sidecar:
    """The HTTP server of a processor. ``port`` is the one it listens at, also where port 0 asked for a free one.

    At shutdown: ``stop`` closes the listening sockets first, gives requests under way ``grace_s`` to finish, then
    cancels them. It may be called at any time, also twice.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        tls: ServerTls | None = None,
        max_connections: int = MAX_CONNECTIONS,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        grace_s: int = 2,
        section: str = "http",
    ) -> None:
        """``section`` of the settings is where ``host`` and ``port`` come from, for errors."""
        self.host = host
        self.port = port
        self.tls = tls
        self._connect = partial(_Connection, max_connections=max_connections, head_timeout_s=head_timeout_s)
        self._app = app
        self._grace_s = grace_s
        self._section = section
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://[{self.host}]:{self.port}" if ":" in self.host else f"{scheme}://{self.host}:{self.port}"

    async def start(self) -> None:
        """Bind and serve; once this returns, requests are answered.

        Raises:
            PortTakenError: The address is in use, or may not be listened at.
            SettingsError: The host is no address of this machine.
        """
        sockets = await _listen(self.host, self.port, self._section)
        self.port = sockets[0].getsockname()[1]
        config = uvicorn.Config(
            self._app,
            http="h11",
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=self._grace_s,
        )
        server = _Server(config, self._connect, self.tls)
        serving = asyncio.create_task(server.serve(sockets=sockets), name="streamproc-sidecar")
        answering = asyncio.create_task(server.answering.wait())
        try:
            await asyncio.wait({answering, serving}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
        except BaseException:
            serving.cancel()
            for listener in sockets:
                listener.close()
            raise
        finally:
            answering.cancel()
        self._server, self._serving = server, serving
        logger.info("the sidecar answers at %s", self.url)

    async def stop(self) -> None:
        """Stop, within the grace and a little."""
        if self._server is None or self._serving is None:
            return
        server, serving = self._server, self._serving
        self._server = self._serving = None
        server.should_exit = True
        await serving
        # uvicorn cancels what outlives the grace without waiting for it to end.
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=1.0)


class _Server(uvicorn.Server):
    """A uvicorn server that leaves the signals alone, limits TLS handshakes, and says when it answers."""

    def __init__(self, config: uvicorn.Config, connect: Callable[..., H11Protocol], tls: ServerTls | None) -> None:
        super().__init__(config)
        self._connect = connect
        self._tls = tls
        self.answering = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """In place of uvicorn's own, which takes files for TLS, and lets a handshake take a minute."""
        loop = asyncio.get_running_loop()
        tls: dict[str, Any] = {}
        if self._tls is not None:
            tls = {"ssl": self._tls.context, "ssl_handshake_timeout": HEAD_TIMEOUT_S}
        make = partial(
            self._connect,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        self.servers = [
            await loop.create_server(make, sock=listener, backlog=BACKLOG, **tls) for listener in sockets or ()
        ]
        self.started = True
        self.answering.set()


class _Connection(H11Protocol):
    """A connection that does not stay for ever without asking for something.

    Where there are as many as may be, the one goes that has been waited for longest: clients that connect and say
    nothing do not keep probes away. Where all of them have asked and wait for their answers the new one is closed.
    """

    def __init__(self, *args: Any, max_connections: int, head_timeout_s: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._max_connections = max_connections
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self._max_connections:
            due = min((it for it in self.connections if isinstance(it, _Connection)), key=_Connection.due_at)
            self.connections.discard(due)  # at once: many may come before the loop tells it that it is closed
            due.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def due_at(self) -> float:
        """When it is closed, by the loop's clock, if it asks for nothing; never where a request of it is under way."""
        return math.inf if self._head_timer is None else self._head_timer.when()

    def _watch(self) -> None:
        """Give the client so long to ask for something, unless a request of it is under way."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self._head_timeout_s, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


async def _listen(host: str, port: int, section: str) -> list[socket.socket]:
    """Sockets that listen at every address of ``host``, all at the same port."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise SettingsError(
            f"{host!r} cannot be resolved ({error.strerror})",
            setting=f"{section}.host",
            hint="use an address of this machine",
        ) from error
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    for family, address in addresses:
        at = (address[0], port, *address[2:])
        try:
            sockets.append(_listener(family, at, dual_stack=len(addresses) == 1))
        except OSError as error:
            if error.errno in _NO_SUCH_ADDRESS:
                # A name such as localhost may stand for an IPv6 address that a container does not have.
                absent = error
                continue
            for bound in sockets:
                bound.close()
            raise _explained(error, host, port, section) from error
        # Where port 0 asked for any, the first address decides for all.
        port = sockets[0].getsockname()[1]
    if absent is not None and not sockets:
        raise SettingsError(
            f"{host!r} is no address of this machine",
            setting=f"{section}.host",
            hint="use 127.0.0.1, or 0.0.0.0 for all",
        ) from absent
    return sockets


def _listener(family: int, address: tuple[object, ...], *, dual_stack: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual_stack else 1)
        listener.bind(address)
        # At once: of two processes that have bound the port, only one can listen.
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _explained(error: OSError, host: str, port: int, section: str) -> PortTakenError:
    remedy = f"stop the process that has it, or set {section}.port to another port, 0 for any free one"
    if error.errno == errno.EADDRINUSE:
        text = f"{section}.port {port} is in use at {host}; {remedy}"
    elif error.errno in {errno.EACCES, errno.EPERM}:
        text = f"{section}.port {port} may not be opened by this user; set {section}.port to one from 1024 on"
    else:
        text = f"{section}.port {port} cannot be opened at {host} ({error.strerror}); {remedy}"
    return PortTakenError(text, host=host, port=port)
