"""THE table of privileges: what each command has to be allowed at Kafka, and no more, in one place.

``python -m streamproc.broker.privileges`` prints it as docs/security.md has it. tests/integration/test_privileges.py
grants each command what stands here to a user of its own, and takes every single privilege away once: with all of them
the command works, without one it says so. So a line that is missing fails a test, and one too many does as well.

Kafka's ACLs say which operation on which resource. Read, Write, Alter and Delete of a topic, and Read of a group,
include Describe; AlterConfigs includes DescribeConfigs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

AclOperation = Literal[
    "Read", "Write", "Create", "Delete", "Alter", "Describe", "DescribeConfigs", "AlterConfigs", "IdempotentWrite"
]
Resource = Literal["Topic", "Group", "TransactionalId", "Cluster"]


class Privilege(NamedTuple):
    """An operation on a resource, by their names in Kafka's ACLs."""

    operation: AclOperation
    resource: Resource
    name: str

    def __str__(self) -> str:
        return f"{self.operation} on {self.resource} {self.name}"


class Need(NamedTuple):
    """A privilege that a command needs; ``of`` says which resource, in the words of the documents.

    ``prefixed``: the name is where the resource's begins. ``without`` says how the command goes on where it is missing;
    empty where it ends at once.
    """

    operation: AclOperation
    resource: Resource
    of: str
    prefixed: bool = False
    without: str = ""


_LIMITS_UNKNOWN = "goes on, and takes the topic for one with Kafka's default max.message.bytes"
_RETENTION_UNKNOWN = "goes on, and does not warn of records that are older than the topic keeps"
_LATER = "ends when it writes first"
_RUN = (
    Need("Read", "Topic", "input"),
    Need("Read", "Group", "group"),
    Need("Write", "Topic", "results"),
    Need("Write", "Topic", "dead letters"),
    Need("Write", "Topic", "metrics"),
    *(Need("DescribeConfigs", "Topic", it, without=_LIMITS_UNKNOWN) for it in ("results", "dead letters", "metrics")),
)

NEEDS: Mapping[str, Sequence[Need]] = {
    "run": _RUN,
    "run, with exactly_once": (*_RUN, Need("Write", "TransactionalId", "group", prefixed=True)),
    "stats": (
        Need("Read", "Topic", "metrics"),
        Need("Read", "Group", "group of the statistics"),
        Need("Create", "Topic", "changelog"),
        Need("Read", "Topic", "changelog"),
        Need("Write", "Topic", "changelog", without=_LATER),
        Need("Create", "Topic", "closed windows"),
        Need("Write", "Topic", "closed windows", without=_LATER),
    ),
    "topics plan": (Need("Describe", "Topic", "declared"), Need("DescribeConfigs", "Topic", "declared")),
    "topics apply": (
        Need("Create", "Topic", "declared"),
        Need("Alter", "Topic", "declared"),
        Need("AlterConfigs", "Topic", "declared"),
    ),
    "topics apply --delete": (
        Need("Describe", "Topic", "declared"),
        Need("DescribeConfigs", "Topic", "declared"),
        Need("Delete", "Topic", "deleted"),
    ),
    "produce": (Need("Write", "Topic", "written"),),
    "consume": (Need("Read", "Topic", "read"),),
    "lag": (Need("Read", "Topic", "input"), Need("Describe", "Group", "group")),
    "dlq list": (Need("Read", "Topic", "dead letters"),),
    "dlq show": (Need("Read", "Topic", "dead letters"),),
    "dlq redrive": (
        Need("Read", "Topic", "dead letters"),
        Need("Write", "Topic", "input"),
        Need("DescribeConfigs", "Topic", "input", without=_RETENTION_UNKNOWN),
        Need("Read", "Group", "progress"),
        Need("Write", "TransactionalId", "progress"),
    ),
    "replay capture": (Need("Read", "Topic", "captured"),),
    "replay run": (
        Need("Write", "Topic", "written"),
        Need("DescribeConfigs", "Topic", "written", without=_RETENTION_UNKNOWN),
    ),
    "replay run --wait-for": (
        Need("Write", "Topic", "written"),
        Need("DescribeConfigs", "Topic", "written", without=_RETENTION_UNKNOWN),
        Need("Describe", "Group", "waited for"),
    ),
    "replay diff": (Need("Read", "Topic", "compared"),),
    "replay shadow": (Need("Read", "Topic", "input"),),
}
"""By command. Those that are not here ask Kafka for nothing."""

BEGIN, END = "<!-- privileges: begin -->", "<!-- privileges: end -->"


def render_markdown() -> str:
    """The table, between the lines that mark it in docs/security.md."""
    lines = [BEGIN, "", "| command | operation | resource | without it |", "| --- | --- | --- | --- |"]
    for command, needs in NEEDS.items():
        shown = f"`{command.partition(',')[0]}`{''.join(command.partition(',')[1:])}"
        for need in needs:
            which = f"{need.resource}: {need.of}" + (" (prefixed)" if need.prefixed else "")
            lines.append(f"| {shown} | {need.operation} | {which} | {need.without or 'ends, and says so'} |")
            shown = ""
    return "\n".join([*lines, "", END])


if __name__ == "__main__":
    sys.stdout.write(render_markdown() + "\n")
