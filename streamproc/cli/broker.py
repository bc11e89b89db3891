"""``streamproc broker``: the embedded broker in the foreground, to try things with."""

from __future__ import annotations

import asyncio
import signal
from typing import Annotated

import typer

from streamproc.cli.terminal import say
from streamproc.errors import EmbeddedBrokerError

app = typer.Typer()


@app.command(epilog="Example: streamproc broker --port 9092")
def broker(
    port: Annotated[
        int, typer.Option(metavar="N", help="Port to listen at; 0 takes a free one.", min=0, max=65_535)
    ] = 9092,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen at. It has no authentication.")
    ] = "127.0.0.1",
) -> None:
    """Run the embedded broker in the foreground, until Ctrl-C; its data is in memory and gone with it."""
    asyncio.run(_serve(port, host))


async def _serve(port: int, host: str) -> None:
    from streamproc.broker.embedded import EmbeddedBroker  # noqa: PLC0415 - --help needs none of it

    told_to_stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told_to_stop.set)
    async with EmbeddedBroker(port, host) as embedded:
        say(f"embedded broker at {embedded.bootstrap_servers}, in memory; Ctrl-C ends it")
        stop = asyncio.create_task(told_to_stop.wait())
        ended = asyncio.create_task(embedded.wait())
        await asyncio.wait({stop, ended}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if ended.done():
            raise EmbeddedBrokerError(
                f"the embedded broker ended by itself with exit code {ended.result()}; its log says:\n"
                f"{embedded.log_tail()}"
            )
        ended.cancel()
    say("stopped")
