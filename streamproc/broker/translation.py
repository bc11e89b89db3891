"""aiokafka's errors as errors of our own tree: one sentence each, naming the setting or the topic and what to do.

The data path catches ``streamproc.errors`` only, so every public method of this package lets nothing else out.
aiokafka often wraps the telling error in a general one; the chain of causes is searched for the first that is known.
"""

from __future__ import annotations

import difflib
import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence

from aiokafka import errors as kafka

from streamproc.broker.privileges import Privilege, Resource
from streamproc.errors import (
    BrokerAuthenticationError,
    BrokerAuthorizationError,
    BrokerError,
    BrokerUnreachableError,
    CommitRejectedError,
    RecordTooLargeError,
    TopicMissingError,
)
from streamproc.settings import KafkaSettings

_UNAUTHORIZED: dict[type[BaseException], Resource] = {
    kafka.TopicAuthorizationFailedError: "Topic",
    kafka.GroupAuthorizationFailedError: "Group",
    kafka.ClusterAuthorizationFailedError: "Cluster",
    kafka.TransactionalIdAuthorizationFailed: "TransactionalId",
}
_UNAUTHENTICATED = (
    kafka.SaslAuthenticationFailed,
    kafka.UnsupportedSaslMechanismError,
    kafka.IllegalSaslStateError,
    kafka.AuthenticationFailedError,
    kafka.AuthenticationMethodNotSupported,
    ssl.SSLError,
)
_OUTDATED = (
    kafka.CommitFailedError,
    kafka.IllegalGenerationError,
    kafka.UnknownMemberIdError,
    kafka.RebalanceInProgressError,
)
_TOO_LARGE = (kafka.MessageSizeTooLargeError, kafka.RecordListTooLargeError)
_SILENT = (
    kafka.KafkaConnectionError,
    kafka.NodeNotReadyError,
    kafka.NoBrokersAvailable,
    kafka.KafkaTimeoutError,
    kafka.RequestTimedOutError,
    kafka.LeaderNotAvailableError,
    kafka.NotLeaderForPartitionError,
    kafka.GroupCoordinatorNotAvailableError,
    TimeoutError,
    OSError,
)

_UNFINISHED = (
    "an earlier transaction has not ended yet, which takes a leader and min.insync.replicas replicas in sync of every "
    "partition that it wrote to; see `kafka-topics.sh --describe --under-min-isr-partitions`"
)
"""What Kafka's "concurrent transactions" means where it lasts: an id has one transaction after the other."""

_LIKE = 0.8
"""Above the likeness of a topic and its `.dead` or `.results`, which are missing because nobody has created them."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__


def brief(error: BaseException) -> str:
    """An error in a few words, without aiokafka's prefixes; its type's name where it says nothing."""
    if isinstance(error, kafka.ConcurrentTransactions):
        return _UNFINISHED
    text = str(error).strip()
    kind = type(error).__name__
    if isinstance(error, kafka.BrokerResponseError):
        text = text.partition("] ")[2] or kind
    return text if " " in text else f"{kind}: {text}" if text not in ("", kind) else kind


def translate(
    error: BaseException, settings: KafkaSettings, *, doing: str, topic: str = "", needs: Sequence[Privilege] = ()
) -> BrokerError:
    """The error of our tree for one of aiokafka's.

    Args:
        error: What aiokafka raised; one of our own comes back as it is.
        settings: How the broker was to be reached, for the message.
        doing: What was being done, as in "could not {doing}".
        topic: The topic concerned, where there is one.
        needs: What one has to be allowed for it.
    """
    where = settings.bootstrap_servers
    for it in chain(error):
        if isinstance(it, BrokerError):
            return it
        if (resource := _UNAUTHORIZED.get(type(it))) is not None:
            return not_allowed(settings, doing, _missing_of(needs, resource, str(it)), brief(it))
        for kinds, explain in _EXPLANATIONS:
            if isinstance(it, kinds):
                return explain(it, settings, doing, topic)
    return BrokerError(
        f"could not {doing}: Kafka at {where} (kafka.bootstrap_servers) refused it: {brief(error)}",
        bootstrap_servers=where,
    )


def _rejected(_: BaseException, settings: KafkaSettings, doing: str, __: str) -> BrokerError:
    return rejected(doing, settings)


def _too_large(_: BaseException, settings: KafkaSettings, doing: str, topic: str) -> BrokerError:
    of = f" of topic {topic}" if topic else ""
    return RecordTooLargeError(
        f"could not {doing}: the batch exceeds max.message.bytes{of}; raise it with `max_message_bytes` in the topic's "
        f"file and `streamproc topics apply`",
        bootstrap_servers=settings.bootstrap_servers,
    )


def _missing(_: BaseException, settings: KafkaSettings, __: str, topic: str) -> BrokerError:
    return missing([topic] if topic else [], settings)


def _refused(error: BaseException, settings: KafkaSettings, _: str, __: str) -> BrokerError:
    return refused(brief(error), settings)


def _silent(error: BaseException, settings: KafkaSettings, doing: str, _: str) -> BrokerError:
    return BrokerUnreachableError(
        f"could not {doing}: Kafka at {settings.bootstrap_servers} (kafka.bootstrap_servers) did not answer "
        f"({brief(error)}); see whether the brokers are up",
        bootstrap_servers=settings.bootstrap_servers,
    )


_EXPLANATIONS: tuple[
    tuple[tuple[type[BaseException], ...], Callable[[BaseException, KafkaSettings, str, str], BrokerError]], ...
] = (
    (_OUTDATED, _rejected),
    (_TOO_LARGE, _too_large),
    ((kafka.UnknownTopicOrPartitionError,), _missing),
    (_UNAUTHENTICATED, _refused),
    (_SILENT, _silent),
)
"""In this order: some of the later kinds include earlier ones, as OSError does ssl.SSLError."""


def _missing_of(needs: Sequence[Privilege], resource: Resource, said: str) -> list[Privilege]:
    """What is missing, as far as the refusal tells: what it is about, and of several what it names."""
    about = [it for it in needs if it.resource == resource]
    return [it for it in about if it.name in said] or about


def not_allowed(
    settings: KafkaSettings, doing: str, needs: Sequence[Privilege], reason: str
) -> BrokerAuthorizationError:
    """The error for what Kafka does not let our user do, with the privileges to grant."""
    wanted = ", ".join(map(str, dict.fromkeys(needs))) or f"the right to {doing}"
    if settings.security_protocol.startswith("SASL"):
        user, instead = settings.sasl_username, "or set kafka.sasl_username to a user who has it"
    elif settings.ssl_cert_file is not None:
        user, instead = "the user of kafka.ssl_cert_file", "or set that to the certificate of one who has it"
    else:
        user, instead = "User:ANONYMOUS", f"or log in: kafka.security_protocol is {settings.security_protocol}"
    return BrokerAuthorizationError(
        f"could not {doing}: Kafka at {settings.bootstrap_servers} does not allow it ({reason}); grant {user} {wanted} "
        f"with an ACL (docs/security.md lists what each command needs), {instead}",
        bootstrap_servers=settings.bootstrap_servers,
    )


def rejected(doing: str, settings: KafkaSettings) -> CommitRejectedError:
    """The error for a commit of a member whose group has moved on."""
    return CommitRejectedError(
        f"could not {doing}: the consumer group has rebalanced since, and another member may own the partitions; "
        f"nothing is lost, the new owner reads these records again",
        bootstrap_servers=settings.bootstrap_servers,
    )


def missing(topics: list[str], settings: KafkaSettings, known: Iterable[str] = ()) -> TopicMissingError:
    """The error for topics that do not exist; those of the ``known`` ones are named that may have been meant."""
    named = ", ".join(topics) or "a topic of the settings"
    several = len(topics) > 1
    there = list(known)
    near = dict.fromkeys(it for topic in topics for it in difflib.get_close_matches(topic, there, n=2, cutoff=_LIKE))
    meant = f"did you mean {' or '.join(near)}? Otherwise " if near else ""
    return TopicMissingError(
        f"{'topics' if several else 'topic'} {named} {'do' if several else 'does'} not exist at "
        f"{settings.bootstrap_servers}; {meant}create {'them' if several else 'it'} with `streamproc topics apply`, "
        f"which needs a file in topics/ for a topic that no task uses{'' if near else ', or correct the name'}",
        topics=topics,
        bootstrap_servers=settings.bootstrap_servers,
    )


def refused(reason: str, settings: KafkaSettings) -> BrokerAuthenticationError:
    """The error for credentials or TLS settings that the broker does not take."""
    where = settings.bootstrap_servers
    if settings.security_protocol.startswith("SASL"):
        source = "kafka.sasl_password_file" if settings.sasl_password_file else "kafka.sasl_password"
        hint = (
            f"see kafka.sasl_username ({settings.sasl_username}), {source}, "
            f"kafka.sasl_mechanism ({settings.sasl_mechanism}) and kafka.security_protocol "
            f"({settings.security_protocol})"
        )
    else:
        hint = f"see kafka.security_protocol ({settings.security_protocol}) and kafka.ssl_ca_file"
    return BrokerAuthenticationError(
        f"Kafka at {where} refuses the connection: {reason.rstrip('.')}; {hint}", bootstrap_servers=where
    )
