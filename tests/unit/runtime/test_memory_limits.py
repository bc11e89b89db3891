"""The kernel's count of out-of-memory kills: where it stands, by version of control groups, and what it explains."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.runtime.memory_limits import EXPLAINS_FOR_S, OutOfMemoryKills, kill_counter, read_kills

V2_EVENTS = "low 0\nhigh 0\nmax 12\noom 2\noom_kill 5\noom_group_kill 0\n"
V1_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"
V1_MEMBERSHIP = "9:name=systemd:/\n4:memory:/app/one\n1:cpu,cpuacct:/\n0::/\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("membership", "place", "text"),
    [
        ("0::/system.slice/app.service\n", "system.slice/app.service/memory.events", V2_EVENTS),
        ("0::/\n", "memory.events", V2_EVENTS),
        ("0::/outside/of/the/container\n", "memory.events", V2_EVENTS),
        (V1_MEMBERSHIP, "memory/app/one/memory.oom_control", V1_CONTROL),
        (V1_MEMBERSHIP, "memory/memory.oom_control", V1_CONTROL),
        ("3:cpu,memory:/one\n", "memory/one/memory.oom_control", V1_CONTROL),
    ],
    ids=["2", "2, root of the namespace", "2, path from outside", "1", "1, path from outside", "1, shared"],
)
def test_the_counter_of_our_group_is_found(tmp_path: Path, membership: str, place: str, text: str) -> None:
    counter = write(tmp_path / "mount" / place, text)
    found = kill_counter(tmp_path / "mount", write(tmp_path / "cgroup", membership))
    assert found == counter
    assert read_kills(counter) == 5


@pytest.mark.parametrize("membership", ["", "0::/app\n", V1_MEMBERSHIP, "1:name=systemd:/\n"])
def test_where_nothing_is_counted_there_is_no_counter(tmp_path: Path, membership: str) -> None:
    assert kill_counter(tmp_path, write(tmp_path / "cgroup", membership)) is None
    assert kill_counter(tmp_path, tmp_path / "absent") is None
    kills = OutOfMemoryKills(None)
    kills.look(0.0)
    assert not kills.explain(1.0)


def test_a_kernel_that_counts_no_kills_is_none(tmp_path: Path) -> None:
    assert read_kills(write(tmp_path / "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n")) is None


def test_a_counter_that_goes_away_explains_nothing_and_counts_on_when_it_is_back(tmp_path: Path) -> None:
    counter = write(tmp_path / "memory.events", "oom_kill 5\n")
    kills = OutOfMemoryKills(counter)
    counter.unlink()
    assert not kills.explain(1.0)
    write(counter, "oom_kill 6\n")
    assert kills.explain(2.0)
    assert not kills.explain(2.0)


@given(st.lists(st.tuples(st.floats(0, 2 * EXPLAINS_FOR_S), st.integers(0, 3), st.booleans()), max_size=30))
def test_a_kill_explains_one_death_and_is_forgotten(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, int, bool]]
) -> None:
    counter = write(tmp_path_factory.getbasetemp() / "kills" / "memory.events", "oom_kill 7\n")
    kills = OutOfMemoryKills(counter)
    now, total = 0.0, 7
    seen: list[float] = []  # the model: when each kill that explains nothing yet was noted
    for passed, more, somebody_died in steps:
        now += passed
        total += more
        counter.write_text(f"oom_kill {total}\n")
        seen = [at for at in seen if now - at <= EXPLAINS_FOR_S] + [now] * more
        if somebody_died:
            assert kills.explain(now) == bool(seen)
            seen = seen[1:]
        else:
            kills.look(now)
