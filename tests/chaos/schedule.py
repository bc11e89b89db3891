"""Which faults, when, on what: a pure function of the seed and the duration, so that a run can be replayed.

Targets are indexes (replica 2, node 3), never process ids. Invariants of a schedule:

- The kinds come in rounds, shuffled, so that each is there once before any is there twice; the first round is complete
  whatever the duration.
- One replica of the three is always left alone, and one that was hit has some seconds to itself afterwards.
- At most one node is down or cut off from a replica at a time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

REPLICAS = 3
NODES = 3
EXTRA_REPLICA = 4
"""The one that joins for a while."""

FIRST_AT_S = 3.0
GAP_S = (5.0, 10.0)
QUIET_S = 12.0
"""No fault begins this close to the end, but for those of the first round."""
REPLICA_REST_S = 4.0
NODE_REST_S = 6.0


class Kind(StrEnum):
    """What can happen."""

    KILL_WORKER = "kill worker"
    KILL_REPLICA = "kill replica"
    KILL_BROKER = "kill broker"
    PAUSE_REPLICA = "pause replica"
    RESTART_REPLICA = "restart replica"
    EXTRA_REPLICA = "extra replica"
    REFUSE = "cut, refused"
    BLACK_HOLE = "cut, black hole"


# How long each lasts. A pause outlives the session of 6 s; a killed replica may be back before it is missed, or not.
LASTS_S = {
    Kind.KILL_WORKER: (0.0, 0.0),
    Kind.KILL_REPLICA: (0.5, 9.0),
    Kind.KILL_BROKER: (2.0, 9.0),
    Kind.PAUSE_REPLICA: (8.0, 15.0),
    Kind.RESTART_REPLICA: (0.2, 5.0),
    Kind.EXTRA_REPLICA: (6.0, 14.0),
    Kind.REFUSE: (2.0, 12.0),
    Kind.BLACK_HOLE: (4.0, 15.0),
}
CUTS = (Kind.REFUSE, Kind.BLACK_HOLE)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: begins ``at_s`` seconds after the load, ends ``lasts_s`` later.

    ``node`` is the broker that is killed, or that is cut off from the replica; None cuts off all of them.
    """

    at_s: float
    kind: Kind
    replica: int | None = None
    node: int | None = None
    lasts_s: float = 0.0

    @property
    def ends_s(self) -> float:
        return self.at_s + self.lasts_s

    def __str__(self) -> str:
        replica = f" {self.replica}" if self.replica is not None else ""
        node = "" if self.node is None else f" node {self.node}"
        if self.kind in CUTS:
            node = f" from {node.strip() or 'all nodes'}"
            replica = f" replica{replica}"
        lasts = f", {self.lasts_s:.1f} s" if self.lasts_s else ""
        return f"{self.kind}{replica}{node}{lasts}"


def make_schedule(seed: int, duration_s: float) -> list[Fault]:
    """The faults of a run, in the order of their beginnings."""
    rng = random.Random(seed)
    kinds = list(Kind)
    room_s = max(duration_s - FIRST_AT_S - QUIET_S, 0.0)
    scale = min(1.0, room_s / (len(kinds) * GAP_S[1]))  # a short run's first round is denser
    replica_free_s = dict.fromkeys(range(1, REPLICAS + 1), 0.0)
    extra_free_s = node_free_s = 0.0
    faults: list[Fault] = []
    at_s = FIRST_AT_S
    while True:
        rng.shuffle(kinds)
        for kind in kinds:
            lasts_s = round(rng.uniform(*LASTS_S[kind]), 1)
            replica = node = None
            if kind == Kind.EXTRA_REPLICA:
                at_s = max(at_s, extra_free_s)
                replica = EXTRA_REPLICA
                extra_free_s = at_s + lasts_s + REPLICA_REST_S
            elif kind != Kind.KILL_BROKER:
                at_s = max(at_s, sorted(replica_free_s.values())[1])  # two are free, and one of them stays so
                replica = rng.choice([it for it, free_s in replica_free_s.items() if free_s <= at_s])
            if kind == Kind.KILL_BROKER or (kind in CUTS and rng.random() < 0.5):
                at_s = max(at_s, node_free_s)
                node = rng.randint(1, NODES)
                node_free_s = at_s + lasts_s + NODE_REST_S
            if replica in replica_free_s:
                replica_free_s[replica] = at_s + lasts_s + REPLICA_REST_S
            if len(faults) >= len(kinds) and at_s > duration_s - QUIET_S:
                return faults
            faults.append(Fault(round(at_s, 1), kind, replica, node, lasts_s))
            at_s += rng.uniform(*GAP_S) * (scale if len(faults) < len(kinds) else 1.0)


def lines(schedule: Sequence[Fault]) -> list[str]:
    """The schedule for people."""
    return [f"{fault.at_s:7.1f} s  {fault}" for fault in schedule]
