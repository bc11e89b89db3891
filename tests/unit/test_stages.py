"""A sample counts for the innermost stage that it is in."""

from __future__ import annotations

import pytest

from benchmarks.stages import LOOP, OTHER, shares, stage_of

LOOP_FRAMES = ["main (benchmarks/contestants.py:9)", "run (uvloop/__init__.py:69)", "run (asyncio/runners.py:118)"]


def test_the_innermost_known_frame_says_whose_a_sample_is() -> None:
    pump = [*LOOP_FRAMES, "_pump (streamproc/runtime/sink.py:320)"]
    assert stage_of(pump) == "sink"
    assert stage_of([*pump, "extend (streamproc/broker/producer.py:347)"]) == "Kafka client, writing"
    send = [*LOOP_FRAMES, "send (aiokafka/conn.py:423)", "write (asyncio/streams.py:343)"]
    assert stage_of(send) == "Kafka client, connections"
    assert stage_of(LOOP_FRAMES) == LOOP


def test_start_and_end_are_nobodys() -> None:
    imports = [
        *LOOP_FRAMES,
        "_load_unlocked (<frozen importlib._bootstrap>:690)",
        "<module> (streamproc/runtime/sink.py:1)",
    ]
    assert stage_of(imports) == OTHER
    assert stage_of(["<module> (benchmarks/contestants.py:1)"]) == OTHER


def test_shares_are_of_what_counts() -> None:
    sink = ";".join([*LOOP_FRAMES, "_pump (streamproc/runtime/sink.py:320)"])
    raw = f"{sink} 30\n{';'.join(LOOP_FRAMES)} 10\n<module> (x.py:1) 60\n"
    assert shares(raw) == pytest.approx({"sink": 0.75, LOOP: 0.25})
