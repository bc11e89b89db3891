"""Every error streamproc raises, drawn along the data path.

    settings ─► SettingsError                        the user's file or environment is wrong        exit 2
    backend  ─► BackendError                         the user's code
                  ├ InferenceBackendLoadError          cannot be imported or is no backend
                  ├ InferenceBackendInitializationError  initialize() raised
                  ├ InferenceBackendRuntimeError       a step raised, or its answer is no list
                  ├ InferenceBackendValidationError    check_io() found the wrong shape
                  ├ PreprocessorInitError              the preprocessor's settings cannot work
                  ├ PreprocessorRuntimeError           a record cannot be preprocessed
                  └ UnknownPreprocessorError           no such input_format
    broker   ─► BrokerError                          Kafka said no, or nothing
                  ├ BrokerUnreachableError             nobody answers at the address
                  ├ BrokerAuthenticationError          the credentials or the TLS settings are refused
                  ├ BrokerAuthorizationError           an operation is not allowed
                  ├ TopicMissingError                  a topic that the settings name does not exist
                  ├ CommitRejectedError                the group has moved on since; harmless
                  ├ InstanceFencedError                another replica has joined under this one's name
                  ├ TransactionAbortedError            a transaction was given up; its records are processed again
                  ├ RecordTooLargeError                a topic refuses a batch for its size
                  └ EmbeddedBrokerError                the embedded broker cannot be found or started
    pool     ─► PoolError                            the worker processes
                  └ WorkerStartError                   a worker cannot be brought to readiness
    sink     ─► SinkError                            results cannot be written and cannot be given up
    reload   ─► ReloadRefusedError                   a new version is not taken; the one before goes on
                  └ ReloadBusyError                    another reload is under way, or the processor stops
    formats  ─► RegistryError                        the schema registry does not answer, or refuses to
    policy   ─► TaskStoppedError                     a record failed and the settings say: stop
    sidecar  ─► PortTakenError                       the HTTP port is in use
             ─► RequestError                         a request over HTTP gets no results
                  ├ RequestsFullError                  as many wait as may
                  └ TaskUnavailableError               its task takes none at the moment
             ─► SidecarError                         a command cannot ask the sidecar, or is refused by it
    stats    ─► StatsError                           the statistics cannot go on
    anywhere ─► InternalError                        a fault of streamproc itself; the processor stops rather than limps

What happens to one record or one batch is data, not an exception: see ``records.Failure``.
Every exception is one sentence that says what was wrong, where, and what to do; the facts in it are attributes too.
The names of the backend's errors are packflow's, so that code written for packflow catches them unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def text_of(value: object) -> str:
    """``str(value)`` of what the user's code made, whose own ``__str__`` may raise. Never raises."""
    try:
        return f"{value!s}"
    except BaseException as error:  # noqa: BLE001 - whatever it raises, there is something else to be reported
        return f"({name_of_type(value)}, whose text cannot be had: {name_of_type(error)})"


def name_of_type(value: object) -> str:
    """The name of a value's type, of at most 100 characters."""
    return type.__dict__["__name__"].__get__(type(value))[:100]  # type: ignore[no-any-return]  # a metaclass may lie


class StreamprocError(Exception):
    """The root of the tree: catch this to catch everything streamproc raises on purpose."""

    exit_code = 1


class SettingsError(StreamprocError):
    """A setting is wrong. ``setting`` is its dotted name, ``place`` the file and line or the environment variable.

    The message is one line that can be printed, whatever was in the file.
    """

    exit_code = 2

    def __init__(self, problem: str, *, setting: str = "", place: str = "", hint: str = "") -> None:
        self.problem = printable(problem)
        self.setting = printable(setting)
        self.place = printable(place)
        self.hint = printable(hint)
        where = ": ".join(part for part in (self.place, self.setting) if part)
        text = f"{where}: {self.problem}" if where else self.problem
        super().__init__(f"{text}; {self.hint}" if hint else text)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_settings_error, (self.problem, self.setting, self.place, self.hint))


SECRET_IN_TEXT = re.compile(
    r"((?:pas+(?:word|wd|phrase)?|secret|token|credential|(?:api|private|access)_?key)\w*['\"]?\s*[:=]).*",
    re.IGNORECASE | re.DOTALL,
)
"""`sasl_password:hunter2`, without the space, is no password to YAML but a key or a text, which messages quote."""


def printable(text: str) -> str:
    """Text in one line of at most 1,000 characters, with escapes in place of what cannot be printed, and no secret."""
    text = SECRET_IN_TEXT.sub(r"\1********", text)
    if not text.isprintable():
        text = "".join([it if it.isprintable() else it.encode("unicode_escape").decode() for it in text[:1_000]])
    return text if len(text) <= 1_000 else f"{text[:999]}…"


def _rebuild_settings_error(problem: str, setting: str, place: str, hint: str) -> SettingsError:
    return SettingsError(problem, setting=setting, place=place, hint=hint)


class BackendError(StreamprocError):
    """The user's backend, or the way it is set up, failed."""


class InferenceBackendLoadError(BackendError):
    """The backend cannot be imported, has no such name, or is not a backend."""


class InferenceBackendInitializationError(BackendError):
    """The backend's ``initialize()`` raised; the cause is chained."""


class InferenceBackendRuntimeError(BackendError):
    """A step of the backend raised (the cause is chained), or its final output is not a list."""


class InferenceBackendValidationError(BackendError):
    """The backend's inputs or outputs do not have the shape that a stream needs."""


class PreprocessorInitError(BackendError):
    """The preprocessor cannot work with this configuration."""


class PreprocessorRuntimeError(BackendError):
    """The preprocessor cannot work with this input."""


class UnknownPreprocessorError(BackendError):
    """``input_format`` names no preprocessor."""


class BrokerError(StreamprocError):
    """Kafka refused, or did not answer. ``bootstrap_servers`` says which."""

    def __init__(self, message: str, *, bootstrap_servers: str = "") -> None:
        self.bootstrap_servers = bootstrap_servers
        super().__init__(message)


class BrokerUnreachableError(BrokerError):
    """Nobody answers at ``kafka.bootstrap_servers``."""


class BrokerAuthenticationError(BrokerError):
    """The broker refuses the credentials or the TLS settings."""


class BrokerAuthorizationError(BrokerError):
    """The broker knows who we are and does not allow the operation."""


class TopicMissingError(BrokerError):
    """Topics that the settings name do not exist. ``topics`` lists them."""

    def __init__(self, message: str, *, topics: Sequence[str] = (), bootstrap_servers: str = "") -> None:
        self.topics = tuple(topics)
        super().__init__(message, bootstrap_servers=bootstrap_servers)


class CommitRejectedError(BrokerError):
    """The group rebalanced before the commit arrived: another member owns the partitions now."""


class InstanceFencedError(BrokerError):
    """Another member of the group has joined under the same ``kafka.group_instance_id``."""


class TransactionAbortedError(BrokerError):
    """A transaction was given up: nothing of it is visible, and its records are processed again."""


class RecordTooLargeError(BrokerError):
    """A topic's ``max.message.bytes`` refuses what was sent to it."""


class EmbeddedBrokerError(BrokerError):
    """The embedded broker is not installed or did not come up."""


class PoolError(StreamprocError):
    """The pool of worker processes cannot go on."""


class WorkerStartError(PoolError):
    """A worker did not become ready. ``attempts`` says how often it was tried, ``detail`` what the worker said last."""

    def __init__(self, message: str, *, attempts: int = 1, detail: str = "") -> None:
        self.attempts = attempts
        self.detail = detail
        super().__init__(message)


class SinkError(StreamprocError):
    """Records cannot be written to an output topic, and giving them up would lose them."""

    def __init__(self, message: str, *, topic: str = "", partition: int = -1) -> None:
        self.topic = topic
        self.partition = partition
        super().__init__(message)


class ReloadRefusedError(StreamprocError):
    """A new version of backend and settings was refused; everything goes on as before."""


class ReloadBusyError(ReloadRefusedError):
    """Nothing can be reloaded now: another reload is under way, or the processor is starting or stopping."""


class RegistryError(StreamprocError):
    """The schema registry does not answer, refuses to, or is none. ``url`` says which, without credentials."""

    def __init__(self, message: str, *, url: str = "") -> None:
        self.url = url
        super().__init__(message)


class TaskStoppedError(StreamprocError):
    """A record failed and its task's ``on_error.then`` is ``stop``."""

    def __init__(self, message: str, *, task: str = "", topic: str = "", partition: int = -1, offset: int = -1) -> None:
        self.task = task
        self.topic = topic
        self.partition = partition
        self.offset = offset
        super().__init__(message)


class PortTakenError(StreamprocError):
    """The sidecar cannot listen at its address."""

    def __init__(self, message: str, *, host: str = "", port: int = 0) -> None:
        self.host = host
        self.port = port
        super().__init__(message)


class RequestError(StreamprocError):
    """A request over HTTP gets no results. ``retry_after_s`` says when to try again, if that is known."""

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class RequestsFullError(RequestError):
    """As many requests wait, or as many bytes of them, as the settings allow."""


class TaskUnavailableError(RequestError):
    """The task takes no requests: its circuit is open, or the processor starts or stops."""


class SidecarError(StreamprocError):
    """A processor's sidecar does not answer a command, or refuses it. ``url`` says which.

    Where it answered, ``status`` is that of HTTP and ``detail`` its sentence.
    """

    def __init__(self, message: str, *, url: str = "", status: int | None = None, detail: str = "") -> None:
        self.url = url
        self.status = status
        self.detail = detail
        super().__init__(message)


class StatsError(StreamprocError):
    """The statistics cannot go on."""


class EstimateError(StreamprocError):
    """What batches cost cannot be measured, or the file of it cannot be read or written, or is none."""


class InternalError(StreamprocError):
    """Something that should not happen did: a fault of streamproc, with its cause chained. ``where`` names the part."""

    def __init__(self, cause: BaseException, *, where: str) -> None:
        self.where = where
        super().__init__(
            f"a fault of streamproc in {where}: {type(cause).__name__}: {cause}; nothing uncommitted is lost, start it "
            f"again, and please report it with the log"
        )
        self.__cause__ = cause
