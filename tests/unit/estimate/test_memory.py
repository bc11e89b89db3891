"""Peaks of memory, and budgets."""

from __future__ import annotations

import mmap
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from streamproc.cli.estimate import parse_size
from streamproc.cli.terminal import UsageError
from streamproc.runtime.memory_budget import Budget, budget_of, group_bytes
from streamproc.runtime.peak_memory import CudaPeak, HostPeak, peak_of_backend

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_each_peak_is_of_what_came_since_the_last() -> None:
    peak = HostPeak()
    peak.reset()
    idle = peak.read()
    # Of the kernel itself: the heap may have as much to spare, where a test has told it to keep what is freed.
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE) as grown:
        for _ in range(64):
            grown.write(b"1" * MIB)
        assert peak.read() - idle == pytest.approx(64 * MIB, rel=0.1)
    peak.reset()
    assert peak.read() - idle < 16 * MIB
    assert peak.now() == pytest.approx(peak.read(), rel=0.05)


def test_without_resource_limits_nothing_is_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert HostPeak().ceiling() is None


def test_a_limit_on_addresses_leaves_what_is_not_reserved_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    known = psutil.Process().memory_info()
    limits = {resource.RLIMIT_AS: known.vms + 100 * MIB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], resource.RLIM_INFINITY))
    ceiling = HostPeak().ceiling()
    assert ceiling is not None
    assert ceiling[1] == "RLIMIT_AS"
    assert ceiling[0] - known.rss == pytest.approx(100 * MIB, abs=8 * MIB)


def test_the_devices_peak_is_the_frameworks(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 5, "peak": 9}

    def reset() -> None:
        held["peak"] = held["now"]

    cuda = SimpleNamespace(
        is_available=lambda: True,
        memory_reserved=lambda: held["now"],
        max_memory_reserved=lambda: held["peak"],
        reset_peak_memory_stats=reset,
        mem_get_info=lambda: (100, 200),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    peak = peak_of_backend()
    assert isinstance(peak, CudaPeak)
    assert (peak.read(), peak.now(), peak.ceiling()) == (9, 5, (105, "the device"))
    peak.reset()
    assert peak.read() == 5


def test_a_framework_that_holds_nothing_of_a_device_leaves_it_at_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert isinstance(peak_of_backend(), HostPeak)


def chosen(
    option: int | None = None,
    setting: int | None = None,
    ceiling: tuple[int, str] | None = None,
    workers: int = 1,
    group: int | None = None,
) -> Budget:
    return budget_of(option, setting, ceiling, workers, group_bytes=group, machine_bytes=10 * GIB)


def test_the_nearest_limit_is_the_budget() -> None:
    everything = (1 * GIB, 2_048, (3 * GIB, "RLIMIT_AS"))
    assert chosen(*everything) == Budget(1 * GIB, "--memory-budget")
    assert chosen(None, *everything[1:]) == Budget(2 * GIB, "pool.max_worker_memory_mb")
    assert chosen(ceiling=everything[2]) == Budget(3 * GIB, "RLIMIT_AS")
    assert chosen(ceiling=everything[2], workers=4) == Budget(2 * GIB, "80% of the machine's memory by 4 workers")
    assert chosen(group=5 * GIB) == Budget(4 * GIB, "80% of the control group's limit")
    assert chosen() == Budget(8 * GIB, "80% of the machine's memory")


def test_the_limit_of_a_control_group_is_the_least_of_those_around_it(tmp_path: Path) -> None:
    for folder, limit in (("", None), ("a", "4096"), ("a/b", "max"), ("a/b/c", "8192")):
        (tmp_path / folder).mkdir(exist_ok=True)
        if limit is not None:
            (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
    membership = tmp_path / "cgroup"
    for path, found in (("/a/b/c", 4_096), ("/a/b", 4_096), ("/", None), ("/seen/from/outside", None)):
        membership.write_text(f"0::{path}\n")
        assert group_bytes(tmp_path, membership) == found


def test_version_1_of_control_groups_says_none_by_a_number(tmp_path: Path) -> None:
    (tmp_path / "memory" / "a").mkdir(parents=True)
    limit = tmp_path / "memory" / "a" / "memory.limit_in_bytes"
    membership = tmp_path / "cgroup"
    membership.write_text("5:cpu,memory:/a\n0::/\n")
    for text, found in (("9223372036854771712", None), ("1048576", MIB)):
        limit.write_text(text)
        assert group_bytes(tmp_path, membership) == found
    assert group_bytes(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 * GIB), ("1.5G", 1_500_000_000), ("512 mib", 512 * MIB), ("7", 7), ("64KB", 64_000)]
)
def test_sizes_are_written_as_people_do(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1PiB", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)
