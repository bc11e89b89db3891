"""The declared topics against the cluster: what would change, and changing it.

    declared = load_topics(settings.topics_dir)
    async with KafkaAdmin(settings.kafka) as admin:
        declared |= implied_topics(settings, declared, await admin.topics())
        it = await plan(declared, admin)
        done = await apply(it, admin)

Invariants:

- Planning changes nothing, and a plan that was applied leaves an empty one.
- What could lose records (shorter retention, another clean-up policy, deletion) is marked destructive, and applied only
  when that is allowed. What Kafka cannot do (fewer partitions) or only an administrator should (replication) is shown
  and never applied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from streamproc.broker.declared_topics import FOREVER, DeclaredTopic, load_topics
from streamproc.broker.interface import Admin, ConfigEntry, NewTopic, TopicInfo
from streamproc.errors import TopicMissingError
from streamproc.settings import Settings

__all__ = ["Applied", "Change", "DeclaredTopic", "Plan", "apply", "implied_topics", "load_topics", "plan"]

Action = Literal["create", "add partitions", "configure", "delete", "drift"]

_DEAD_LETTER_ROOM_BYTES = 65_536
_KAFKA_MAX_MESSAGE_BYTES = 1_048_588
_KEEPING = {"retention.ms", "retention.bytes"}


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between a topic and its declaration; ``drift`` is one that is never applied.

    ``setting`` is Kafka's name of a configuration, or ``partitions`` or ``replication``; empty for a whole topic.
    """

    action: Action
    topic: str
    setting: str = ""
    old: str | None = None
    new: str | None = None
    destructive: bool = False
    implied: bool = False
    place: str = ""
    note: str = ""
    creates: NewTopic | None = None

    @property
    def what(self) -> str:
        """The change in a few words."""
        if self.creates is not None:
            it = self.creates
            replication = "the cluster's default" if it.replication == -1 else str(it.replication)
            configs = "".join(f", {name}={value}" for name, value in sorted(it.configs.items()))
            return f"partitions={it.partitions}, replication={replication}{configs}"
        if self.action == "delete":
            return "with all its records"
        return f"{self.setting} {'unset' if self.old is None else self.old} → {self.new}"

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        described: dict[str, Any] = {
            "action": self.action,
            "topic": self.topic,
            "what": self.what,
            "destructive": self.destructive,
            "implied": self.implied,
        }
        optional = {"setting": self.setting, "old": self.old, "new": self.new, "place": self.place, "note": self.note}
        return described | {name: value for name, value in optional.items() if value}


@dataclass(frozen=True, slots=True)
class Plan:
    """What would change, topic by topic."""

    changes: tuple[Change, ...]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to apply; drift may remain."""
        return not self.to_apply

    @property
    def to_apply(self) -> tuple[Change, ...]:
        """All but drift."""
        return tuple(change for change in self.changes if change.action != "drift")

    @property
    def destructive(self) -> tuple[Change, ...]:
        """What is applied only when it is allowed to lose records."""
        return tuple(change for change in self.changes if change.destructive)

    @property
    def drift(self) -> tuple[Change, ...]:
        """What is never applied."""
        return tuple(change for change in self.changes if change.action == "drift")

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: topic, action, what, note."""
        return [
            (it.topic, f"{it.action} (destructive)" if it.destructive else it.action, it.what, it.note or it.place)
            for it in self.changes
        ]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"empty": self.empty, "changes": [change.as_json() for change in self.changes]}


@dataclass(frozen=True, slots=True)
class Applied:
    """What ``apply`` did, and what it left undone since it could lose records."""

    done: tuple[Change, ...]
    refused: tuple[Change, ...]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "done": [change.as_json() for change in self.done],
            "refused": [change.as_json() for change in self.refused],
        }


def implied_topics(
    settings: Settings, declared: Mapping[str, DeclaredTopic], existing: Mapping[str, TopicInfo] | None = None
) -> dict[str, DeclaredTopic]:
    """The topics that tasks use and no file declares.

    Results and dead letters get as many partitions as the input, so that order and place carry over; dead letters get
    room for the largest input with its headers. ``existing`` are the cluster's topics.
    """
    found: dict[str, DeclaredTopic] = {}

    def partitions(topic: str) -> int:
        # An input that is declared to grow grows in the same round as what hangs on it.
        there = existing[topic].partitions if existing and topic in existing else 1
        return max(there, declared[topic].partitions) if topic in declared else there

    def need(topic: str, count: int, use: str, **configs: str) -> None:
        if topic in declared:
            return
        before = found.get(topic)
        kafka_names = {name.replace("_", "."): value for name, value in configs.items()}
        if before is not None:  # tasks may share metrics and dead letters: the larger need counts
            count = max(count, before.partitions)
            sizes = [int(it["max.message.bytes"]) for it in (before.configs, kafka_names) if "max.message.bytes" in it]
            kafka_names = {"max.message.bytes": str(max(sizes))} if sizes else {}
        description = before.description if before is not None else use
        found[topic] = DeclaredTopic(topic, count, configs=kafka_names, description=description, implied=True)

    for name, task in settings.tasks.items():
        topics = settings.topics_of(name)
        count = max(partitions(topic) for topic in topics.inputs)
        largest = [int(declared[it].configs.get("max.message.bytes", 0)) for it in topics.inputs if it in declared]
        room = max(*largest, task.input.max_value_bytes, _KAFKA_MAX_MESSAGE_BYTES) + _DEAD_LETTER_ROOM_BYTES
        for topic in topics.inputs:
            need(topic, partitions(topic), f"input of task {name}")
        need(topics.results, count, f"results of task {name}")
        need(topics.metrics, 1, f"metrics of task {name}")
        need(topics.dead, count, f"dead letters of task {name}", max_message_bytes=str(room))
    return found


async def plan(declared: Mapping[str, DeclaredTopic], admin: Admin, *, delete: bool = False) -> Plan:
    """Compare with the cluster.

    Args:
        declared: The topics as they should be, implied ones included.
        admin: Looks at the cluster.
        delete: Also plan to delete every topic that is not among them, but for Kafka's own.

    Raises:
        BrokerAuthorizationError: we may not look at a topic, whether or not it exists.
    """
    existing = await admin.topics()
    if any(name not in existing for name in declared):
        with contextlib.suppress(TopicMissingError):  # to be created; those that are hidden from us are not
            await admin.check_topics(list(declared), "Describe")
    changes: list[Change] = []
    for name, it in sorted(declared.items()):
        if name not in existing:
            new = NewTopic(name, it.partitions, it.replication, it.configs)
            changes.append(
                Change("create", name, implied=it.implied, place=it.place, note=_use(it), creates=new),
            )
            continue
        changes += _partitions(it, existing[name])
        if it.configs:
            changes += _configs(it, await admin.describe_configs(name))
    if delete:
        changes += [
            Change("delete", name, destructive=True, note="not declared")
            for name, info in sorted(existing.items())
            if name not in declared and not info.internal and not name.startswith("__")
        ]
    return Plan(tuple(changes))


async def apply(plan: Plan, admin: Admin, *, allow_destructive: bool = False) -> Applied:
    """Make the changes of a plan, the harmless ones first; those that could lose records only when allowed.

    Raises:
        BrokerError: a change failed; those before it are made, and a new plan shows the rest.
    """
    wanted = plan.to_apply
    chosen = [change for change in wanted if allow_destructive or not change.destructive]
    created = [change.creates for change in chosen if change.creates is not None]
    if created:
        await admin.create_topics(created)
    for change in chosen:
        if change.action == "add partitions" and change.new is not None:
            await admin.add_partitions(change.topic, int(change.new))
    for topic in dict.fromkeys(change.topic for change in chosen if change.action == "configure"):
        of_topic = [change for change in chosen if change.action == "configure" and change.topic == topic]
        await admin.set_configs(topic, {change.setting: change.new or "" for change in of_topic})
    deleted = [change.topic for change in chosen if change.action == "delete"]
    if deleted:
        await admin.delete_topics(deleted)
    return Applied(tuple(chosen), tuple(change for change in wanted if change not in chosen))


def _use(topic: DeclaredTopic) -> str:
    return f"implied: {topic.description}" if topic.implied else ""


def _partitions(topic: DeclaredTopic, found: TopicInfo) -> list[Change]:
    changes = []
    there, wanted = found.partitions, topic.partitions

    def change(action: Action, setting: str, old: int, new: int, note: str) -> Change:
        return Change(
            action, topic.name, setting, str(old), str(new), implied=topic.implied, place=topic.place, note=note
        )

    if wanted > there:
        note = "keys move to other partitions, so that their order across the change is lost"
        changes.append(change("add partitions", "partitions", there, wanted, note))
    elif wanted < there and not topic.implied:
        note = f"Kafka cannot take partitions away: declare {there}, or move to a new topic"
        changes.append(change("drift", "partitions", there, wanted, note))
    if topic.replication not in (-1, found.replication):
        note = "not applied: it moves data between brokers; use kafka-reassign-partitions.sh"
        changes.append(change("drift", "replication", found.replication, topic.replication, note))
    return changes


def _configs(topic: DeclaredTopic, found: Mapping[str, ConfigEntry]) -> list[Change]:
    changes = []
    for name, wanted in sorted(topic.configs.items()):
        entry = found.get(name)
        there = entry.value if entry is not None else None
        if _same(name, there, wanted) or (topic.implied and _suffices(there, wanted)):
            continue
        loses = there is not None and _loses(name, there, wanted)
        changes.append(
            Change(
                "configure",
                topic.name,
                name,
                there,
                wanted,
                destructive=loses,
                implied=topic.implied,
                place=topic.place,
                note="records that are kept now may be deleted" if loses else "",
            )
        )
    return changes


def _same(name: str, there: str | None, wanted: str) -> bool:
    if there is None or there == wanted:
        return there == wanted
    if name == "cleanup.policy":
        return set(_policies(there)) == set(_policies(wanted))
    return there.lower() == wanted.lower() in ("true", "false")


def _suffices(there: str | None, wanted: str) -> bool:
    """Of an implied topic: whether what is there is no less than what is needed."""
    return there is not None and there.isdigit() and wanted.isdigit() and int(there) >= int(wanted)


def _loses(name: str, there: str, wanted: str) -> bool:
    if name == "cleanup.policy":
        return not set(_policies(wanted)) <= set(_policies(there))
    if name not in _KEEPING:
        return False
    try:
        old, new = int(there), int(wanted)
    except ValueError:
        return True
    return new != FOREVER and (old == FOREVER or new < old)


def _policies(text: str) -> list[str]:
    return [policy.strip() for policy in text.split(",") if policy.strip()]
