"""Source, batcher, sequencer and ledger together, without I/O: a machine plays consumer, workers and broker.

Whatever the limits, down to one record, and in whatever order things happen: what is in flight stays within the limits,
nothing is lost, nothing is written twice under one lease, and nothing waits for ever.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamproc.records import Batch, BatchReport, Lease, Outcome, Record, Span, Status, TopicPartition, value_sizes
from streamproc.runtime.batcher import Batcher
from streamproc.runtime.cost import CostModel
from streamproc.runtime.ledger import Ledger
from streamproc.runtime.online_cost import OnlineCost
from streamproc.runtime.sequencer import make_sequencer
from streamproc.runtime.source import Room, Source
from streamproc.settings import BatchSettings
from tests.support.polling import HandConsumer
from tests.support.spans import FakeRecord

LARGEST_VALUE = 9
KEYS = [None, b"a", b"b"]
COST = CostModel(alpha_ms=0.1, gamma_ms=0.01)
"""Of a batch and its padding: so little for a batch that lengths apart stay apart."""
PLACES = 3
"""Batches that the workers take at once."""


class Chain(RuleBasedStateMachine):
    """The stages as ``task_stream`` and ``processor`` wire them; the logs have no end."""

    @initialize(
        ordering=st.sampled_from(["partition", "key", "unordered"]),
        limits=st.tuples(st.sampled_from([1, 2, 3, 5, 8, 20, 60]), st.sampled_from([1, 2, 10, 30, 100, 400])),
        batches=st.tuples(st.sampled_from([1, 2, 4, 16]), st.sampled_from([1, 12, 1_000])),
        strategy=st.sampled_from(["fifo", "bucketed", "exact"]),
        partitions=st.integers(1, 4),
    )
    def begin(
        self, *, ordering: str, limits: tuple[int, int], batches: tuple[int, int], strategy: str, partitions: int
    ) -> None:
        self.ordering = ordering
        self.max_records, self.max_bytes = limits
        self.partitions = [TopicPartition("in", number) for number in range(partitions)]
        self.consumer = HandConsumer()
        self.ledger = Ledger()
        self.sequencer = make_sequencer(ordering)
        batch_settings = BatchSettings.model_validate(
            {
                "strategy": strategy,
                "length": "bytes",
                "max_size": batches[0],
                "max_bytes": batches[1],
                "max_padded": 1_800,
            }
        )
        self.ids = itertools.count(1)
        self.batcher = Batcher("main", batch_settings, lambda: next(self.ids), cost=OnlineCost(COST))
        self.source = Source(
            self.consumer,  # type: ignore[arg-type] # what the source uses of it
            Room(*limits),
            lambda: (self.ledger.outstanding_records, self.ledger.in_flight_bytes),
            self.ledger.loads,
            on_records=self.on_records,
            on_pause=lambda paused: None,  # noqa: ARG005 - nobody counts here
        )
        self.position = dict.fromkeys(self.partitions, 0)
        self.committed = dict.fromkeys(self.partitions, 0)
        self.running: list[Batch] = []
        self.again: deque[Batch] = deque()
        self.retries: list[Batch] = []
        self.lanes: defaultdict[TopicPartition, deque[Outcome]] = defaultdict(deque)
        self.written: defaultdict[Lease, list[tuple[int, bytes | None]]] = defaultdict(list)
        self.acknowledged: defaultdict[TopicPartition, set[int]] = defaultdict(set)
        self.poll_bytes = 0
        self.read: defaultdict[Lease, list[int]] = defaultdict(list)
        self.assign()
        self.consumer.run(self.source.run())

    def assign(self) -> None:
        self.ledger.open(self.partitions)
        self.source.assigned(set(self.partitions))
        self.position = dict(self.committed)

    def on_records(self, partition: TopicPartition, records: Sequence[Record]) -> int:
        lease = self.ledger.lease(partition)
        assert lease is not None
        sizes = value_sizes(records)
        span = Span(lease, self.ledger.next_sequence(lease), records, sizes, 0.0, [size * 30 for size in sizes])
        self.read[lease] += [record.offset for record in records]
        self.ledger.read(span)
        self.sequencer.expect(span)
        self.batcher.add(span)
        return max(sizes)

    @property
    def crowded(self) -> bool:
        return self.ledger.output_bytes > self.max_bytes

    # -- the consumer

    @rule(data=st.data())
    def poll(self, data: st.DataObject) -> None:
        """The poll that is out brings what there is room for, of partitions that are not paused."""
        open_now = [partition for partition in self.partitions if partition not in self.consumer.paused]
        before, left = self.ledger.in_flight_bytes, self.consumer.wanted
        polled: dict[TopicPartition, list[Record]] = {}
        for partition in data.draw(st.permutations(open_now)) if len(open_now) > 1 else open_now:
            records: list[Record] = []
            # A byte a record, which says how large it is, which key it has, and whether offsets are missing before it.
            count = data.draw(st.sampled_from([0, 1, min(left, 3), min(left, 30)]))
            for byte in data.draw(st.binary(min_size=count, max_size=count)) if left else b"":
                offset = self.position[partition] + byte // 128
                value = b"x" * (byte % (LARGEST_VALUE + 1))
                records.append(FakeRecord(offset, KEYS[byte % len(KEYS)], value, partition=partition.partition))
                self.position[partition] = offset + 1
            left -= len(records)
            if records:
                polled[partition] = records
        self.poll_bytes = max(self.poll_bytes, sum(len(it.value or b"") for some in polled.values() for it in some))
        was_full = before >= self.max_bytes and self.source.paused >= set(self.partitions)
        assert not (polled and was_full)
        self.consumer.answer(polled)
        self.dispatch()

    # -- the workers

    def dispatch(self) -> None:
        """As much as the workers take: again first; while results pile up nothing that they do not wait for."""
        while len(self.running) < PLACES:
            if self.again:
                batch = self.again.popleft()
                live = [span for span in batch.spans if self.ledger.is_live(span.lease)]
                if not live:
                    continue
                batch.restrict(live)
            elif (
                closed_by := self.batcher.overtaken() if self.crowded else self.batcher.due(0.0, backlog=True)
            ) is not None:
                batch = self.batcher.take(0.0, closed_by)
            else:
                return
            self.running.append(batch)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), growth=st.integers(0, 30))
    def reply(self, data: st.DataObject, growth: int) -> None:
        """Any running batch comes to its end, with results of any size."""
        self.replied(self.running.pop(data.draw(st.integers(0, len(self.running) - 1))), growth)
        self.dispatch()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), retry=st.booleans())
    def fail(self, data: st.DataObject, retry: bool) -> None:
        """A batch fails: it waits to be run again, or goes on in parts; one record alone is given up."""
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if retry:
            self.retries.append(batch)
        elif batch.size > 1:
            for spans in batch.parts():
                half = Batch(next(self.ids), "main", spans, 0.0, 0.0, "split", 0.0)
                self.again.append(half)
        else:
            self.replied(batch, 0)
        self.dispatch()

    @precondition(lambda self: self.retries)
    @rule(data=st.data())
    def run_again(self, data: st.DataObject) -> None:
        self.again.append(self.retries.pop(data.draw(st.integers(0, len(self.retries) - 1))))
        self.dispatch()

    def replied(self, batch: Batch, growth: int) -> None:
        report = BatchReport(batch, 0, b"", 1)
        for span in batch.spans:
            count = len(span.records)
            self.ledger.produced(span, growth * count)
            if self.ledger.is_live(span.lease):
                outcome = Outcome(span, bytes([Status.RESULT]) * count, [memoryview(b"y" * growth)] * count, report)
                for released in self.sequencer.complete(outcome):
                    self.write(released)
        batch.release()

    # -- the broker

    def write(self, outcome: Outcome) -> None:
        lease = outcome.span.lease
        self.written[lease] += [(record.offset, record.key) for record in outcome.span.records]
        self.lanes[lease.partition].append(outcome)

    @precondition(lambda self: any(self.lanes.values()))
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        """The broker takes what a lane has first."""
        self.take(data.draw(st.sampled_from(sorted(it for it in self.lanes if self.lanes[it]))))
        self.dispatch()

    def take(self, partition: TopicPartition) -> None:
        span = self.lanes[partition].popleft().span
        self.acknowledged[partition] |= {record.offset for record in span.records}
        if self.ledger.settle(span):
            self.source.relieved()

    @rule()
    def commit(self) -> None:
        offsets = self.ledger.committable()
        self.ledger.committed(offsets)
        self.committed.update(offsets)

    @precondition(lambda self: sum(map(len, self.written.values())) > 10 * len(self.written))
    @rule(partitions=st.integers(1, 4))
    def rebalance(self, partitions: int) -> None:
        """Everything is revoked, with batches running, and other partitions are assigned."""
        old, self.partitions = self.partitions, [TopicPartition("in", number) for number in range(partitions)]
        self.source.revoked(set(old))
        leases = set(self.ledger.leases())
        for span in self.batcher.discard(leases):
            self.ledger.discard(span)
        self.commit()
        self.ledger.close(old)
        self.sequencer.forget(leases)
        self.consumer.paused.clear()
        for partition in self.partitions:
            self.committed.setdefault(partition, 0)
        self.assign()

    # -- what must hold

    @invariant()
    def what_is_in_flight_stays_within_the_limits(self) -> None:
        ledger = self.ledger
        assert 0 <= ledger.in_flight_records <= ledger.outstanding_records <= self.max_records
        assert ledger.in_flight_bytes - ledger.output_bytes < self.max_bytes + max(self.poll_bytes, 1)

    @invariant()
    def the_books_add_up(self) -> None:
        """Each record is in one place: the batcher, a batch, the sequencer, or on its way to the broker."""
        ledger = self.ledger
        batches = [*self.running, *self.again, *self.retries]
        spans = [it for batch in batches for it in batch.spans] + [
            outcome.span for lane in self.lanes.values() for outcome in lane
        ]
        counted = sum(len(it.records) for it in spans if ledger.is_live(it.lease))
        held = ledger.in_flight_records - counted - self.batcher.size
        assert held >= 0
        if self.ordering == "unordered":
            assert held == 0
        loads = list(ledger.loads())
        assert sum(records for _, records, _ in loads) == ledger.outstanding_records
        assert sum(size for _, _, size in loads) == ledger.in_flight_bytes

    @invariant()
    def what_is_committable_is_acknowledged(self) -> None:
        for partition, offset in self.ledger.committable().items():
            lease = self.ledger.lease(partition)
            assert lease is not None
            assert {it for it in self.read[lease] if it < offset} <= self.acknowledged[partition]

    @invariant()
    def nothing_is_written_twice_or_out_of_order(self) -> None:
        for written in self.written.values():
            offsets = [offset for offset, _ in written]
            assert len(set(offsets)) == len(offsets)
            scopes: dict[str, list[list[int]]] = {
                "partition": [offsets],
                "key": [[o for o, k in written if k == key] for key in KEYS],
                "unordered": [],
            }
            assert all(it == sorted(it) for it in scopes[self.ordering])

    @rule()
    def settle_everything(self) -> None:
        """From wherever it is: once workers and broker answer, everything is settled, and everything is read again."""
        for _ in range(10_000):
            self.again.extend(self.retries)
            self.retries.clear()
            self.dispatch()
            if self.running:
                self.replied(self.running.pop(), 30)
            elif waiting := [it for it in self.lanes if self.lanes[it]]:
                self.take(waiting[0])
            else:
                break
        assert not self.batcher.size, "a window that nobody dispatches"
        ledger = self.ledger
        assert (ledger.in_flight_records, ledger.in_flight_bytes, ledger.output_bytes) == (0, 0, 0)
        assert ledger.outstanding_records == 0
        assert self.consumer.paused == set(), "a partition that nobody resumes"
        self.commit()
        for partition in self.partitions:
            lease = ledger.lease(partition)
            assert lease is not None
            assert sorted(offset for offset, _ in self.written[lease]) == self.read[lease]
            assert self.committed[partition] == self.position[partition]

    def teardown(self) -> None:
        self.settle_everything()
        self.consumer.close()


TestChain = Chain.TestCase
TestChain.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
