"""``streamproc top``: running processors, live, by what their sidecars say of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

import orjson
import typer

from streamproc.cli.sidecar import ask_sidecar, sidecar_token, sidecar_url
from streamproc.cli.terminal import ConfigOption, show, stdout
from streamproc.errors import SidecarError

if TYPE_CHECKING:
    from streamproc.cli.top_history import Figures, History
    from streamproc.observe.status import ProcessorStatus

app = typer.Typer()

T = TypeVar("T")
_TIMEOUT_S = 5.0
_PATIENCE_S = 1.0
"""A frame waits no longer for who does not answer."""


@app.command(epilog="Example: streamproc top --url http://10.0.0.4:8080 --url http://10.0.0.5:8080")
def top(
    *,
    url: Annotated[
        list[str] | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="A sidecar; several times for several replicas, which are added up.",
            show_default="http.host and http.port of the settings",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="The token to send, where something before the sidecar asks for one.",
            show_default="without --url that of the settings",
        ),
    ] = None,
    interval_s: Annotated[
        float, typer.Option("--interval-s", metavar="SECONDS", min=0.1, help="Seconds from one frame to the next.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One frame, of two readings that far apart, and end.")] = False,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON a frame, for scripts.")] = False,
) -> None:
    """Watch running processors: throughput, lag, batches, workers and what they are doing; q or Ctrl-C ends.

    Rates, means and quantiles are of the last five seconds; what was given up is counted since the start of the
    process. A replica that goes away is shown as lost until it is back. Elsewhere than on a terminal, frames are plain
    text.
    """
    urls = list(dict.fromkeys(sidecar_url(it, config) for it in (url or (None,))))
    watch = _Watch(urls, sidecar_token(token_file, config, from_settings=not url), interval_s, once=once)
    raise SystemExit(asyncio.run(watch.run(_audience(as_json=as_json, once=once))))


class _Audience(Protocol):
    """Who the frames are for."""

    def watching(self, quit_: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Around all frames; ``quit_`` is for whoever has seen enough."""

    def tell(self, figures: Figures) -> None:
        """The next frame."""


class _Watch:
    """Asks the replicas again and again."""

    def __init__(self, urls: Sequence[str], token: str | None, interval_s: float, *, once: bool) -> None:
        from streamproc.cli.top_history import History  # noqa: PLC0415 - --help needs no pydantic

        self._urls = urls
        self._token = token
        self._interval_s = interval_s
        self._once = once
        self._history: History = History(urls)
        self._asked: dict[str, asyncio.Future[tuple[ProcessorStatus, float]]] = {}

    async def run(self, audience: _Audience) -> int:
        """Until it is told to end; the exit code. Raises SidecarError where no replica answers at the beginning."""
        ended = asyncio.Event()
        code = 0

        def terminate() -> None:
            nonlocal code
            code = 128 + signal.SIGTERM
            ended.set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)  # the terminal is put right first
        await self._first()
        with audience.watching(ended.set):
            frames = asyncio.ensure_future(self._frames(audience))
            ending = asyncio.ensure_future(ended.wait())
            try:
                await asyncio.wait({frames, ending}, return_when=asyncio.FIRST_COMPLETED)
                if frames.done():
                    frames.result()
            finally:
                frames.cancel()
                ending.cancel()
        return code

    async def _first(self) -> None:
        errors = await self._poll(None)
        if len(errors) == len(self._urls):
            raise errors[0]

    async def _frames(self, audience: _Audience) -> None:
        begun = time.monotonic()
        if not self._once:
            audience.tell(self._history.next_frame(begun))
        while True:
            await asyncio.sleep(max(begun + self._interval_s - time.monotonic(), 0.0))
            begun = time.monotonic()
            await self._poll(min(self._interval_s, _PATIENCE_S))
            audience.tell(self._history.next_frame(time.monotonic()))
            if self._once:
                return

    async def _poll(self, patience_s: float | None) -> list[SidecarError]:
        """Ask every replica that is not being asked already; why some did not answer."""
        for url in self._urls:
            if url not in self._asked:
                self._asked[url] = _in_a_thread(partial(_status, url, self._token))
        await asyncio.wait(self._asked.values(), timeout=patience_s)
        errors: list[SidecarError] = []
        for url, answer in list(self._asked.items()):
            if not answer.done():
                self._history.lose(url, f"no answer within {patience_s:g} s", time.monotonic())
                continue
            del self._asked[url]
            try:
                self._history.add(url, *answer.result())
            except SidecarError as error:
                errors.append(error)
                self._history.lose(url, str(error), time.monotonic())
        return errors


def _status(url: str, token: str | None) -> tuple[ProcessorStatus, float]:
    """What the sidecar says, and when. Raises SidecarError."""
    from pydantic import ValidationError  # noqa: PLC0415 - --help needs none of it

    from streamproc.observe.status import ProcessorStatus  # noqa: PLC0415 - as above

    told = ask_sidecar(url, "GET", "/status", timeout_s=_TIMEOUT_S, token=token)
    now = time.monotonic()
    try:
        return ProcessorStatus.model_validate(told), now
    except ValidationError as error:
        raise SidecarError(
            f"what answers at {url} has no status that is known here; is it streamproc, and of this version?", url=url
        ) from error


def _in_a_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """The call's outcome, from a thread that nobody waits for at the end; asyncio's own are waited for."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        settle: Callable[[], None]
        try:
            settle = partial(future.set_result, call())
        except BaseException as error:  # noqa: BLE001 - it is raised where the future is awaited
            settle = partial(future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits for it
            loop.call_soon_threadsafe(settle)

    threading.Thread(target=run, daemon=True).start()
    return future


# -- who the frames are for


def _audience(*, as_json: bool, once: bool) -> _Audience:
    if as_json:
        return _Lines()
    if once or not stdout.is_terminal or stdout.is_dumb_terminal:
        return _Text()
    return _Screen()


class _Lines:
    """Scripts: a line of JSON a frame."""

    @contextlib.contextmanager
    def watching(self, quit_: Callable[[], None]) -> Iterator[None]:
        """Nobody there to quit."""
        del quit_
        yield

    def tell(self, figures: Figures) -> None:
        """A line."""
        told = {
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **{name: getattr(figures, name) for name in figures.__slots__ if name != "trend"},
        }
        sys.stdout.write(orjson.dumps(told, default=lambda it: it.model_dump(mode="json")).decode() + "\n")
        sys.stdout.flush()


class _Text:
    """A pipe or a file, and a terminal for one frame."""

    def __init__(self) -> None:
        self._told = False

    @contextlib.contextmanager
    def watching(self, quit_: Callable[[], None]) -> Iterator[None]:
        """Nobody there to quit."""
        del quit_
        yield

    def tell(self, figures: Figures) -> None:
        """A frame below the one before."""
        from rich.console import Group  # noqa: PLC0415 - as below

        from streamproc.cli.top_frame import frame  # noqa: PLC0415 - --help needs no pydantic

        if self._told:
            sys.stdout.write("\n")
        self._told = True
        show(Group(*frame(figures, stdout.width, ascii_only=stdout.options.ascii_only)))
        sys.stdout.flush()


class _Screen:
    """A person at a terminal: a screen of its own, one frame in place of the other, and keys."""

    def __init__(self) -> None:
        self._draw: Callable[[Figures], None] = lambda _: None
        self._last: Figures | None = None

    @contextlib.contextmanager
    def watching(self, quit_: Callable[[], None]) -> Iterator[None]:
        """From here on keys are looked at, and the terminal is as before afterwards."""
        from rich.console import Group  # noqa: PLC0415 - as above
        from rich.live import Live  # noqa: PLC0415 - as above

        from streamproc.cli.top_frame import frame  # noqa: PLC0415 - as above

        hint = "q ends" if sys.stdin.isatty() else ""
        loop = asyncio.get_running_loop()
        with Live(console=stdout, screen=True, auto_refresh=False) as live, _keys(quit_):

            def draw(figures: Figures) -> None:
                width, height = stdout.size
                lines = frame(figures, width, height, hint=hint, ascii_only=stdout.options.ascii_only)
                live.update(Group(*lines), refresh=True)

            self._draw = draw
            loop.add_signal_handler(signal.SIGWINCH, self._again)
            try:
                yield
            finally:
                loop.remove_signal_handler(signal.SIGWINCH)

    def tell(self, figures: Figures) -> None:
        """Draw a frame."""
        self._last = figures
        self._draw(figures)

    def _again(self) -> None:
        if self._last is not None:
            self._draw(self._last)


@contextlib.contextmanager
def _keys(quit_: Callable[[], None]) -> Iterator[None]:
    """Look at keys one by one, where there is a keyboard."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def pressed() -> None:
        try:
            keys = os.read(descriptor, 1_024)
        except OSError:  # the terminal has gone
            keys = b""
        if not keys or b"q" in keys.lower():
            quit_()

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)  # Ctrl-C stays a signal
    loop.add_reader(descriptor, pressed)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
