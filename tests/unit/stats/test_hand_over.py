"""What Faust hands over counts once, whenever it does so."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import orjson

from streamproc.settings import Settings
from streamproc.stats import app as stats_app
from streamproc.stats.app import StatsApp
from streamproc.stats.windows import Windows
from tests.support.asyncs import until

NOW_S = 1_700_000_000.0


@dataclass
class Message:
    offset: int
    generation_id: int
    partition: int = 0
    acked: bool = False

    @property
    def value(self) -> bytes:
        return orjson.dumps({"timestamp": int(NOW_S * 1_000), "offset": self.offset})

    def ack(self, _: Any) -> None:
        self.acked = True


class Held(dict[str, Any]):
    """A table whose changelog is written at once."""

    async def written(self) -> None:
        pass


def group(generation: int, *, is_whole: bool) -> SimpleNamespace:
    """Faust, as far as it is asked here: ``is_whole`` once the group has its partitions, and their tables."""
    return SimpleNamespace(
        rebalancing=not is_whole,
        tables=SimpleNamespace(actives_ready=is_whole),
        consumer_generation_id=generation,
        consumer=SimpleNamespace(assignment=set),
    )


def made(faust: SimpleNamespace) -> tuple[StatsApp, Windows]:
    """Statistics over a table in memory, in a Faust that is as it is told."""
    raw = {"name": "app", "backend": {"path": "a:B"}, "tasks": {"main": {"input": {"topics": ["in"]}}}}
    it = StatsApp(Settings.model_validate(raw), {"m": 1}, embedded=True, wall_clock=lambda: NOW_S)
    table = Held()
    it._tables, it._windows = cast("Any", {"m": table}), {"m": Windows(table, grace_ms=1_000)}
    it.faust = cast("Any", faust)
    return it, it._windows["m"]


def test_records_that_come_before_their_tables_wait_for_them(monkeypatch: Any) -> None:
    monkeypatch.setattr(stats_app, "SHARED_OUT_S", 0.001)

    async def test() -> None:
        faust = group(2, is_whole=False)
        it, windows = made(faust)
        messages = [Message(0, 2), Message(1, 2)]
        taking = asyncio.ensure_future(it._take("m", messages))
        await asyncio.wait({taking}, timeout=0.02)
        assert not taking.done()
        assert not any(it.acked for it in messages)
        faust.tables.actives_ready = True
        await asyncio.wait({taking}, timeout=0.02)
        assert not taking.done()
        faust.rebalancing = False
        await until(taking.done, "they are counted")
        taking.result()
        assert windows.progress(0).applied == 1
        assert all(it.acked for it in messages)

    asyncio.run(test())


def test_what_was_read_before_the_group_was_shared_out_anew_is_left_to_be_read_again() -> None:
    async def test() -> None:
        faust = group(3, is_whole=True)
        it, windows = made(faust)
        before, again = [Message(5, 2), Message(6, 2)], [Message(4, 3), Message(5, 3), Message(6, 3)]
        await it._take("m", before)
        assert windows.progress(0).applied == -1
        assert not any(it.acked for it in before)
        await it._take("m", again)
        assert windows.progress(0).applied == 6
        assert all(it.acked for it in again)

    asyncio.run(test())
