"""The settings of a processor: pydantic models of ``streamproc.yaml``.

Units are in the names. Unknown keys are refused. What one field cannot know is checked across fields at the end, and
the message says why. ``settings_loading`` reads files and the environment into these models and finds the place of
each value; nothing here does I/O.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SecretStr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from streamproc.records import Cause

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN, max_length=100)]
TopicName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$", max_length=249)]

Device = Annotated[
    str, Field(coerce_numbers_to_str=True), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer"}]})
]
"""An index may stand as a number."""

INT32_MAX = 2_147_483_647
"""Kafka's protocol has 32 bits for these."""

BASE_DIR = "base_dir"
"""The validation context's key for the folder that relative paths start from; without it they stay relative."""


class CrossFieldError(ValueError):
    """Settings that are right by themselves do not go together.

    ``keys`` are the places that it can be mended at, relative to the model that raised, the most relevant first;
    the message is ``problem``, then ``hint``: what to do.
    """

    def __init__(self, problem: str, *, hint: str, keys: Sequence[tuple[str, ...]]) -> None:
        self.problem = problem
        self.hint = hint
        self.keys = tuple(keys)
        super().__init__(f"{'.'.join(self.keys[0])}: {problem}; {hint}")


def _beside_the_settings(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get(BASE_DIR)
    # Without `..` in the middle, which messages would show; links are left as they are.
    return path if base is None else Path(os.path.normpath(Path(base, path)))


SettingsPath = Annotated[Path, AfterValidator(_beside_the_settings)]


class Section(BaseModel):
    """A part of the settings: immutable, and strict about its keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        ser_json_inf_nan="constants",
    )

    short_forms: ClassVar[tuple[str, ...]] = ()
    """Words that may stand in the place of the whole section."""


def _http_address(url: str) -> SplitResult | None:
    """The parts of an HTTP address; None where it is none."""
    try:
        parts = urlsplit(url)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    return parts if has_host and url.isascii() and url.isprintable() and " " not in url else None


class KafkaSettings(Section):
    """How to reach Kafka, and how the consumer groups behave."""

    bootstrap_servers: str = "localhost:9092"
    """Brokers to ask first, `host:port`, several separated by commas."""
    client_id: str | None = None
    """Shown in the brokers' logs and quotas; the application's name by default."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How connections are secured."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    """How to log in, with a SASL security protocol."""
    sasl_username: str | None = None
    """User to log in as."""
    sasl_password: SecretStr | None = None
    """Password to log in with; better from STREAMPROC_KAFKA__SASL_PASSWORD or a file."""
    sasl_password_file: SettingsPath | None = None
    """File that holds the password, for secrets mounted into a container."""
    ssl_ca_file: SettingsPath | None = None
    """Certificate authority that signs the brokers' certificates; the system's by default."""
    ssl_cert_file: SettingsPath | None = None
    """Client certificate, where the brokers ask for one."""
    ssl_key_file: SettingsPath | None = None
    """Private key of the client certificate."""
    ssl_check_hostname: bool = True
    """Whether the broker's name must match its certificate."""
    group_instance_id: Name | None = None
    """Static membership: a name of this replica that survives restarts, so that a restart causes no rebalance."""
    session_timeout_ms: int = Field(default=30_000, ge=1_000, le=INT32_MAX)
    """A replica that sends no heartbeat for this long is taken out of the group."""
    max_poll_interval_ms: int = Field(default=300_000, ge=1_000, le=INT32_MAX)
    """A replica that does not poll for this long is taken out of the group; inference never blocks polling."""
    request_timeout_ms: int = Field(default=40_000, ge=1_000, le=INT32_MAX)
    """How long one request to a broker may take."""
    transaction_timeout_ms: int = Field(default=10_000, ge=1_000)
    """With exactly_once: a transaction that takes longer is aborted; it holds up its readers while it is open."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    """How long to try to reach a broker at start before giving up."""
    fetch_max_bytes: int = Field(default=8_388_608, ge=1_024, le=INT32_MAX)
    """The most that one fetch request brings from a broker."""

    @model_validator(mode="after")
    def _credentials_are_complete(self) -> Self:
        if self.sasl_password is not None and self.sasl_password_file is not None:
            raise CrossFieldError(
                "is set, and so is sasl_password",
                hint="keep one of them",
                keys=[("sasl_password_file",), ("sasl_password",)],
            )
        if self.security_protocol.startswith("SASL"):
            if self.sasl_username is None:
                raise CrossFieldError(
                    f"{self.security_protocol} needs a user", hint="set sasl_username", keys=[("security_protocol",)]
                )
            if self.sasl_password is None and self.sasl_password_file is None:
                raise CrossFieldError(
                    f"{self.security_protocol} needs a password",
                    hint="set sasl_password_file, or STREAMPROC_KAFKA__SASL_PASSWORD in the environment",
                    keys=[("security_protocol",)],
                )
        if self.ssl_key_file is not None and self.ssl_cert_file is None:
            raise CrossFieldError("needs the certificate", hint="set ssl_cert_file too", keys=[("ssl_key_file",)])
        if self.ssl_cert_file is not None and self.ssl_key_file is None:
            raise CrossFieldError("needs its private key", hint="set ssl_key_file too", keys=[("ssl_cert_file",)])
        return self


class SchemaRegistrySettings(Section):
    """The schema registry, by Confluent's interface, of the formats that need one: avro, protobuf and json_schema."""

    url: str | None = None
    """Where it is, such as `https://registry.example.com:8081`; the workers ask it, the processor does not."""
    username: str | None = None
    """User of its basic authentication."""
    password: SecretStr | None = None
    """Password of the user; better from STREAMPROC_SCHEMA_REGISTRY__PASSWORD or a file."""
    password_file: SettingsPath | None = None
    """File that holds the password; read at each request, so that it may change."""
    token: SecretStr | None = None
    """Bearer token, in place of user and password."""
    token_file: SettingsPath | None = None
    """File that holds the bearer token; read at each request."""
    ssl_ca_file: SettingsPath | None = None
    """Certificate authority that signs its certificate; the system's by default."""
    ssl_cert_file: SettingsPath | None = None
    """Client certificate, where it asks for one."""
    ssl_key_file: SettingsPath | None = None
    """Private key of the client certificate."""
    timeout_s: float = Field(default=5.0, gt=0)
    """How long one request may take; how often it is tried again is said by `on_error.causes.registry`."""

    @model_validator(mode="after")
    def _is_an_address(self) -> Self:
        if self.url is None:
            return self
        key = [("url",)]
        if (parts := _http_address(self.url)) is None:
            raise CrossFieldError("is no address", hint="write it as http://host:port or https://host:port", keys=key)
        if "@" in parts.netloc:
            raise CrossFieldError(
                "holds credentials, which would be shown", hint="set username and password_file", keys=key
            )
        if parts.query or parts.fragment:
            raise CrossFieldError("has more than a path", hint="leave out what begins with ? or #", keys=key)
        return self

    @model_validator(mode="after")
    def _credentials_are_complete(self) -> Self:
        for one, other in (("password_file", "password"), ("token_file", "token"), ("token", "username")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise CrossFieldError(f"is set, and so is {other}", hint="keep one of them", keys=[(one,), (other,)])
        if self.token_file is not None and self.username is not None:
            raise CrossFieldError(
                "is set, and so is username", hint="keep one of them", keys=[("token_file",), ("username",)]
            )
        has_password = self.password is not None or self.password_file is not None
        if (self.username is not None) != has_password:
            raise CrossFieldError(
                "needs a password" if not has_password else "is missing, and a password is set",
                hint="set username and password_file",
                keys=[("username",)],
            )
        if (self.ssl_key_file is None) != (self.ssl_cert_file is None):
            raise CrossFieldError(
                "is set without its private key" if self.ssl_key_file is None else "needs the certificate",
                hint="set ssl_cert_file and ssl_key_file",
                keys=[("ssl_cert_file",) if self.ssl_key_file is None else ("ssl_key_file",)],
            )
        return self


class BackendSettings(Section):
    """The user's model."""

    path: str
    """`module:Name` of a backend class or instance; with `loader: project`, the folder of a packflow project."""
    loader: Literal["local", "module", "project"] = "local"
    """`local`: a file beside the settings; `module`: an installed package; `project`: a folder with packflow.yaml."""
    base_dir: SettingsPath = Path()
    """Where `local` and `project` look, relative to the settings file."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the backend's configuration model."""
    version: str | None = None
    """A name of the model's version, repeated in the metrics topic."""


class RecycleSettings(Section):
    """When a worker is replaced by a fresh one, for backends that leak; null means never."""

    max_batches: int | None = Field(default=None, ge=1)
    """Replace a worker after this many batches."""
    max_rss_mb: int | None = Field(default=None, ge=1)
    """Replace a worker whose resident memory exceeds this many MiB after a batch. For leaks; no batch fails."""


class PoolSettings(Section):
    """The worker processes that run the backend."""

    workers: int = Field(default=1, ge=1, le=1024)
    """Processes, each with a backend of its own; models usually thread by themselves, so start with 1."""
    batch_timeout_s: float = Field(default=300.0, gt=0)
    """A batch that computes for longer fails, and its worker is killed and replaced."""
    initialize_timeout_s: float = Field(default=600.0, gt=0)
    """A worker that is not initialized after this long is killed."""
    start_attempts: int = Field(default=3, ge=1)
    """A worker that fails to initialize this often in a row stops the processor with the cause."""
    restart_backoff_ms: int = Field(default=200, ge=0)
    """Pause before the second restart of a worker in a row; doubles up to 30 s."""
    threads_per_worker: int | None = Field(default=None, ge=1)
    """OMP_NUM_THREADS and its kin in each worker; by default the cores divided by the workers."""
    devices: list[Device] = Field(default_factory=list)
    """GPUs, by index or UUID, handed to the workers in turn as CUDA_VISIBLE_DEVICES."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the workers, set before any import."""
    shared_memory_threshold_bytes: int = Field(default=262_144, ge=0)
    """Batches from this size travel through shared memory, smaller ones through the socket."""
    max_worker_memory_mb: int | None = Field(default=None, ge=1)
    """A worker that computes and holds more resident memory than this, in MiB, is killed; its batch fails as `oom`."""
    recycle: RecycleSettings = RecycleSettings()
    """Replacement of healthy workers."""

    @model_validator(mode="after")
    def _recycling_comes_before_killing(self) -> Self:
        recycled, killed = self.recycle.max_rss_mb, self.max_worker_memory_mb
        if recycled is not None and killed is not None and recycled >= killed:
            raise CrossFieldError(
                f"{recycled} is not below pool.max_worker_memory_mb ({killed}), so that workers would be killed before "
                "they could be recycled",
                hint="lower the one or raise the other",
                keys=[("recycle", "max_rss_mb"), ("max_worker_memory_mb",)],
            )
        return self


Format = Literal["json", "msgpack", "raw", "avro", "protobuf", "json_schema"]
ENVELOPED: tuple[Format, ...] = ("json", "msgpack")
"""Formats that can hold the full envelope."""
REGISTERED: tuple[Format, ...] = ("avro", "protobuf", "json_schema")
"""Formats that need a schema registry."""


class InputSettings(Section):
    """What a task reads."""

    topics: list[TopicName] = Field(min_length=1)
    """Topics to read."""
    auto_offset_reset: Literal["earliest", "latest"] = "earliest"
    """Where to begin in a partition for which the group has no committed offset."""
    format: Format = "json"
    """What values are: `json`, `msgpack`, `raw` (bytes, in the field `value`), or by a schema registry `avro`,
    `protobuf` and `json_schema`."""
    max_value_bytes: int = Field(default=1_048_576, ge=1)
    """A larger value becomes a dead letter. Kafka's own default limit for a message is the same."""


class OutputSettings(Section):
    """Where results go, and how they look."""

    topic: TopicName | None = None
    """Result topic; `<first input topic>.results` by default."""
    envelope: Literal["full", "result", "none"] = "full"
    """`full`: result, metrics and source as one object; `result`: the output record alone, the rest in headers, as it
    is by default with raw, avro, protobuf and json_schema, which cannot hold more; `none`: the output record alone."""
    format: Format = "json"
    """What results are, as `input.format`; dead letters stay as they came, metrics are JSON."""
    subject: str | None = Field(default=None, min_length=1)
    """The schema's subject in the registry, for avro, protobuf and json_schema; `<output topic>-value` by default."""
    schema_version: int | None = Field(default=None, ge=1)
    """The version of the subject's schema; by default the latest when a worker writes its first result."""
    message: str | None = Field(default=None, min_length=1)
    """The Protobuf message to write, by its name; the first of the schema by default."""
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "none"
    """Compression of results, dead letters and metrics."""

    @model_validator(mode="before")
    @classmethod
    def _bare_where_there_is_no_other(cls, data: Any) -> Any:
        if isinstance(data, dict) and "envelope" not in data and data.get("format", "json") not in ENVELOPED:
            return {**data, "envelope": "result"}
        return data

    @model_validator(mode="after")
    def _the_format_holds_it(self) -> Self:
        if self.envelope == "full" and self.format not in ENVELOPED:
            raise CrossFieldError(
                f"{self.format} has no room for the full envelope",
                hint="set envelope: result, or leave it out",
                keys=[("envelope",), ("format",)],
            )
        for key in ("subject", "schema_version"):
            if getattr(self, key) is not None and self.format not in REGISTERED:
                raise CrossFieldError(
                    f"is set, and {self.format} has no schema", hint="leave it out", keys=[(key,), ("format",)]
                )
        if self.message is not None and self.format != "protobuf":
            raise CrossFieldError(
                f"is set, and {self.format} has no messages", hint="leave it out", keys=[("message",), ("format",)]
            )
        return self


class MetricsTopicSettings(Section):
    """Where the metrics record of each batch goes."""

    topic: TopicName | None = None
    """Metrics topic; `<application>.metrics` by default. Tasks may share it."""


class DeadLetterSettings(Section):
    """Where records go that failed."""

    topic: TopicName | None = None
    """Dead-letter topic; `<first input topic>.dead` by default."""


class LengthSettings(Section):
    """What a record is padded by in a batch: its bytes, a field, or what the backend says."""

    short_forms: ClassVar[tuple[str, ...]] = ("bytes", "backend")

    of: Literal["bytes", "field", "backend"]
    """What a record is padded by in a batch: the `bytes` of its value, a `field`, or what the method `length` of the
    `backend` answers; `length: bytes` and `length: backend` say it alone. Without, lengths play no part."""
    field: str | None = Field(default=None, min_length=1)
    """The field to measure, a nested one by dots; a record without it becomes a dead letter."""
    unit: Literal["characters", "bytes", "items", "value"] = "characters"
    """What is counted of the field: a text's `characters` or its `bytes` in UTF-8, a list's `items`, or the `value` of
    a number that is the length itself."""

    @model_validator(mode="before")
    @classmethod
    def _in_full(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"of": data}
        if isinstance(data, dict) and "of" not in data and "field" in data:
            return {**data, "of": "field"}
        return data

    @model_validator(mode="after")
    def _the_field_is_there(self) -> Self:
        if self.of == "field" and self.field is None:
            raise CrossFieldError("a field is to be measured, and none is named", hint="set field", keys=[("field",)])
        if self.of != "field" and self.field is not None:
            raise CrossFieldError(
                f"is set, and of: {self.of} measures no field", hint="keep one of them", keys=[("field",), ("of",)]
            )
        return self

    @property
    def text(self) -> str:
        """What a length counts, in words: ``bytes``, ``backend``, ``characters of body``."""
        return f"{self.unit} of {self.field}" if self.of == "field" else self.of

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The section, whose ``of`` goes without saying where there is a field, or one word in its place."""
        section = handler.resolve_ref_schema(handler(schema))
        section.pop("required", None)
        return {"anyOf": [{"enum": list(cls.short_forms), "type": "string"}, section]}


BatchSize = Annotated[int, Field(ge=1, le=100_000)]
AtLeastOne = Annotated[int, Field(ge=1)]
Milliseconds = Annotated[float, Field(ge=0)]
Oversized = Literal["alone", "dead_letter"]


class BatchDefaults(Section):
    """Limits of the batches of every task that does not set its own."""

    max_size: BatchSize | None = None
    """`max_size` of tasks that set none."""
    max_wait_ms: Milliseconds | None = None
    """`max_wait_ms` of tasks that set none."""
    max_bytes: AtLeastOne | None = None
    """`max_bytes` of tasks that set none."""
    max_padded: AtLeastOne | None = None
    """`max_padded` of tasks that set none and have a `length`."""
    memory_budget_mb: AtLeastOne | None = None
    """`memory_budget_mb` of tasks that set none."""
    oversized: Oversized | None = None
    """`oversized` of tasks that do not set it."""


class BatchSettings(Section):
    """Which records go together in a batch, and when it closes: when it is full, has waited, or would be late."""

    strategy: Literal["none", "fifo", "bucketed", "exact"] = "fifo"
    """`none`: each record alone; `fifo`: in order of arrival; `bucketed`, `exact`: with others of about its length, to
    pad little, the one by buckets, the other by a plan of the 512 oldest. By default bucketed where `length` is set."""
    length: LengthSettings | None = None
    """What a record is padded by in a batch; null: lengths play no part."""
    max_size: BatchSize = 64
    """Most records in a batch; where it is not set and there is an estimate of the task, the estimate's."""
    max_wait_ms: Milliseconds = 20.0
    """Longest time that a record waits for others while a worker is free."""
    max_bytes: AtLeastOne = 4_194_304
    """Most bytes of values in a batch."""
    max_padded: AtLeastOne | None = None
    """Most padded length of a batch, its records times the longest, in units of `length`. For models that pad: it
    bounds a batch's time and memory. Where it is not set and there is an estimate of the task, the estimate's."""
    memory_budget_mb: AtLeastOne | None = None
    """Most memory, in MiB, that a worker may hold while it runs a batch, the model's weights included, as the task's
    estimate predicts it. By default, where there is an estimate, 90 % of `pool.max_worker_memory_mb`, or else of what
    the estimate found, or of the machine's or the control group's share of a worker here, if that is less."""
    oversized: Oversized = "alone"
    """A record that fits no batch, for its bytes, its length or its memory, runs `alone` or becomes a `dead_letter`."""
    target_latency_ms: float | None = Field(default=None, gt=0)
    """A latency to keep: a record's result is to be there so long after its arrival in the processor. Windows close in
    time for it, by what batches are found to take; which records kept it is counted."""
    target_margin_ms: Milliseconds = 2.0
    """Kept from the target for what predictions leave out: the way to the worker and back."""

    @property
    def predicts(self) -> bool:
        """Whether it is of use to predict what a batch takes."""
        return self.length is not None or self.target_latency_ms is not None

    @property
    def length_text(self) -> str | None:
        """What lengths count, in words; None where records have none."""
        return self.length.text if self.length is not None else None

    @model_validator(mode="before")
    @classmethod
    def _bucketed_where_there_is_a_length(cls, data: Any) -> Any:
        if isinstance(data, dict) and "strategy" not in data and data.get("length") is not None:
            return {**data, "strategy": "bucketed"}
        return data

    @model_validator(mode="after")
    def _the_margin_leaves_a_target(self) -> Self:
        target_ms = self.target_latency_ms
        if target_ms is not None and self.target_margin_ms >= target_ms:
            raise CrossFieldError(
                f"{target_ms:g} is not above target_margin_ms ({self.target_margin_ms:g}), which is kept from it",
                hint="raise the one or lower the other",
                keys=[("target_latency_ms",), ("target_margin_ms",)],
            )
        return self

    @model_validator(mode="after")
    def _lengths_are_known(self) -> Self:
        for key, needs in (("strategy", self.strategy in ("bucketed", "exact")), ("max_padded", self.max_padded)):
            if needs and self.length is None:
                raise CrossFieldError(
                    f"{getattr(self, key)} goes by lengths, and records have none",
                    hint="set length, to bytes say",
                    keys=[(key,), ("length",)],
                )
        return self


class CircuitSettings(Section):
    """When too many records fail, the task pauses, rather than turn the stream into dead letters."""

    enabled: bool = True
    """Whether the limits below open the circuit; it can be opened by hand in any case."""
    max_rate: float | None = Field(default=0.5, gt=0, le=1)
    """Open at this share of failed records within `window_s`; null: never. Where half fail, the model is at fault."""
    window_s: float = Field(default=60.0, gt=0)
    """The window of `max_rate`; long enough that a bad burst is weighed against the records around it."""
    min_records: int = Field(default=500, ge=1)
    """`max_rate` counts once the window holds this many records: of fewer, a share says little."""
    max_run: int | None = Field(default=1_000, ge=1)
    """Open at this many failed records in a row; null: never. For slow streams, which never have `min_records`."""
    close_after_s: float | None = Field(default=300.0, gt=0)
    """Close by itself after this time; null: by command only. Trying every 5 minutes costs a night 50,000 records."""


Then = Literal["dead_letter", "drop", "stop"]


class RecordErrorSettings(Section):
    """What becomes of records that fail by themselves, for one cause."""

    then: Then | None = None
    """What becomes of a record that failed for this cause; `on_error.then` by default."""


class BatchErrorSettings(RecordErrorSettings):
    """What happens to batches that fail, for one cause."""

    retries: int | None = Field(default=None, ge=0, le=100)
    """As `on_error.retries`, for this cause; by default that for `exception`, and 0 for the others."""
    backoff_ms: int | None = Field(default=None, ge=0)
    """As `on_error.backoff_ms`, for this cause, and that by default."""


class RegistryErrorSettings(BatchErrorSettings):
    """What happens while the schema registry is away: half a minute to come back, before records are given up."""

    retries: int | None = Field(default=5, ge=0, le=100)
    """Further executions of a batch whose schemas cannot be had, before it is split, and its records are given up."""
    backoff_ms: int | None = Field(default=1_000, ge=0)
    """Pause before the first of them; doubles with each, up to 30 s, with jitter."""


class CauseSettings(Section):
    """What differs for failures of one cause. Records fail by themselves for causes without ``retries``."""

    invalid: RecordErrorSettings = RecordErrorSettings()
    rejected: RecordErrorSettings = RecordErrorSettings()
    exception: BatchErrorSettings = BatchErrorSettings()
    output: BatchErrorSettings = BatchErrorSettings()
    crash: BatchErrorSettings = BatchErrorSettings()
    timeout: BatchErrorSettings = BatchErrorSettings()
    oom: BatchErrorSettings = BatchErrorSettings()
    too_large: RecordErrorSettings = RecordErrorSettings()
    registry: RegistryErrorSettings = RegistryErrorSettings()


class CausePolicy(NamedTuple):
    """What happens to failures of one cause, with everything that was left out filled in."""

    retries: int
    backoff_ms: int
    then: Then


class ErrorSettings(Section):
    """What happens to a batch that fails, and at last to the records at fault."""

    retries: int = Field(default=2, ge=0, le=100)
    """Further executions as a whole of a batch in which the backend raised, before it is split to find the culprits."""
    backoff_ms: int = Field(default=100, ge=0)
    """Pause before the first retry; doubles with each, up to 30 s, with jitter."""
    then: Then = "dead_letter"
    """What becomes of a record that keeps failing."""
    circuit: CircuitSettings = CircuitSettings()
    """The limit on failed records."""
    causes: CauseSettings = CauseSettings()
    """What differs for one cause."""

    def policy(self, cause: Cause) -> CausePolicy:
        """What to do about failures of this cause.

        But for exceptions, which may be a service's that is away for a moment, a batch is not retried as a whole:
        splitting finds the culprit sooner and loses no other record.
        """
        own: RecordErrorSettings = getattr(self.causes, cause.value)
        retries = backoff_ms = None
        if isinstance(own, BatchErrorSettings):
            retries, backoff_ms = own.retries, own.backoff_ms
        return CausePolicy(
            (self.retries if cause is Cause.EXCEPTION else 0) if retries is None else retries,
            self.backoff_ms if backoff_ms is None else backoff_ms,
            own.then or self.then,
        )


class LimitSettings(Section):
    """How much may be read and not yet settled: back-pressure begins here."""

    max_in_flight_records: int = Field(default=20_000, ge=1)
    """Records that are read and cannot be committed yet: their results, or those before them, are not acknowledged."""
    max_in_flight_bytes: int = Field(default=134_217_728, ge=1)
    """Bytes of the values of records in flight and of their results; above it in results alone, no new batch runs."""


class TaskSettings(Section):
    """A named stream: input, batching, output, errors."""

    input: InputSettings
    output: OutputSettings = OutputSettings()
    metrics: MetricsTopicSettings = MetricsTopicSettings()
    dead_letters: DeadLetterSettings = DeadLetterSettings()
    batch: BatchSettings = BatchSettings()
    weight: float = Field(default=1.0, gt=0, le=1_000)
    """The task's share of the workers' time, over the weights of all tasks that want it at the same time."""
    ordering: Literal["partition", "key", "unordered"] = "partition"
    """Results in input order per partition, per key, or as they complete."""
    delivery: Literal["at_least_once", "exactly_once"] = "at_least_once"
    """`exactly_once`: results and offsets in one transaction, in input order per partition whatever `ordering` says."""
    on_error: ErrorSettings = ErrorSettings()
    limits: LimitSettings = LimitSettings()
    commit_interval_ms: int | None = Field(default=None, ge=10)
    """Offsets are committed, and metrics records written, this often; 1000 by default, and 100 with exactly_once, whose
    results become visible with the commit."""

    @property
    def commit_interval_s(self) -> float:
        """Seconds between commits, the default filled in."""
        default_ms = 100 if self.delivery == "exactly_once" else 1_000
        return (default_ms if self.commit_interval_ms is None else self.commit_interval_ms) / 1_000

    @model_validator(mode="after")
    def _limits_fit_a_batch(self) -> Self:
        if self.limits.max_in_flight_records < self.batch.max_size:
            raise CrossFieldError(
                f"{self.limits.max_in_flight_records} is below batch.max_size ({self.batch.max_size}), so that a batch "
                "could never fill",
                hint="raise the one or lower the other",
                keys=[("limits", "max_in_flight_records"), ("batch", "max_size")],
            )
        return self


class PredictSettings(Section):
    """Predictions over HTTP: `POST /tasks/<task>/predict`."""

    enabled: bool | None = None
    """Whether to answer them; by default where not everybody can ask: at a loopback address, or with a token."""
    token: SecretStr | None = Field(default=None, min_length=1)
    """A token that is good for predictions and nothing else, beside http.token, which is good for all."""
    token_file: SettingsPath | None = None
    """File that holds this token."""
    batch_with: Literal["apart", "kafka"] = "apart"
    """`apart`: requests batch among themselves and share the workers with their task's records evenly; `kafka`: they
    batch with the records, in order of arrival, and wait behind what was read before them."""
    timeout_s: float = Field(default=30.0, gt=0)
    """A request that has no results after this time is answered with 504, and its records are not run any more."""
    max_requests: int = Field(default=1_000, ge=1)
    """Most requests of a task that wait for their results; further ones are answered with 429."""
    max_waiting_bytes: int = Field(default=33_554_432, ge=1)
    """Most bytes of a task's requests that wait for their results; further ones are answered with 429."""
    max_body_bytes: int = Field(default=1_048_576, ge=1)
    """A larger body is answered with 413."""
    max_records: int = Field(default=1_000, ge=1)
    """Most records in a request; more are answered with 413."""

    @model_validator(mode="after")
    def _a_body_can_wait(self) -> Self:
        if self.token is not None and self.token_file is not None:
            keys = [("token_file",), ("token",)]
            raise CrossFieldError("is set, and so is token", hint="keep one of them", keys=keys)
        if self.max_waiting_bytes < self.max_body_bytes:
            raise CrossFieldError(
                f"{self.max_waiting_bytes} is below max_body_bytes ({self.max_body_bytes}), so that such a body would "
                "never be taken",
                hint="raise the one or lower the other",
                keys=[("max_waiting_bytes",), ("max_body_bytes",)],
            )
        return self


class HttpSettings(Section):
    """The sidecar: health, metrics, status and predictions over HTTP."""

    enabled: bool = True
    """Whether to serve it."""
    host: str = "127.0.0.1"
    """Address to listen at; loopback by default."""
    port: int = Field(default=8080, ge=0, le=65_535)
    """Port to listen at; 0 takes a free one and says which."""
    stalled_after_s: float = Field(default=300.0, gt=0)
    """Not alive when records wait and none was executed, or offsets wait and none was committed, for this long."""
    token: SecretStr | None = Field(default=None, min_length=1)
    """What whoever asks for a prediction, or changes a circuit from elsewhere, has to send as
    `Authorization: Bearer …`; better from STREAMPROC_HTTP__TOKEN or a file."""
    token_file: SettingsPath | None = None
    """File that holds the token, for secrets mounted into a container."""
    tls_cert_file: SettingsPath | None = None
    """Certificate, with its chain, to be asked by https with; read again at every reload."""
    tls_key_file: SettingsPath | None = None
    """Private key of the certificate."""
    max_connections: int = Field(default=2_000, ge=10)
    """Most connections at a time; those that have asked for nothing go first."""
    predict: PredictSettings = PredictSettings()
    """Predictions over HTTP."""

    @property
    def is_private(self) -> bool:
        """Whether it listens where only this machine can ask."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def predicts(self) -> bool:
        """Whether predictions are answered, the default filled in."""
        return self._not_for_everybody if self.predict.enabled is None else self.predict.enabled

    @property
    def _not_for_everybody(self) -> bool:
        tokens = (self.token, self.token_file, self.predict.token, self.predict.token_file)
        return self.is_private or any(it is not None for it in tokens)

    @model_validator(mode="after")
    def _not_everybody_may_ask(self) -> Self:
        if self.token is not None and self.token_file is not None:
            keys = [("token_file",), ("token",)]
            raise CrossFieldError("is set, and so is token", hint="keep one of them", keys=keys)
        if self.tls_key_file is not None and self.tls_cert_file is None:
            raise CrossFieldError("needs the certificate", hint="set tls_cert_file too", keys=[("tls_key_file",)])
        if self.tls_cert_file is not None and self.tls_key_file is None:
            raise CrossFieldError("needs its private key", hint="set tls_key_file too", keys=[("tls_cert_file",)])
        if self.predict.enabled and not self._not_for_everybody:
            raise CrossFieldError(
                f"whoever reaches {self.host} could ask for predictions",
                hint="set http.token_file, or STREAMPROC_HTTP__TOKEN in the environment, or listen at 127.0.0.1",
                keys=[("predict", "enabled"), ("host",)],
            )
        return self


class StatsSettings(Section):
    """The statistics of all replicas: `streamproc stats`."""

    topic: TopicName | None = None
    """Where closed windows go; `<application>.stats` by default."""
    grace_s: float = Field(default=60.0, ge=0, le=3_600)
    """How long after its end a window takes metrics records that come late; it closes then."""
    host: str = "127.0.0.1"
    """Address that its HTTP server listens at; loopback by default."""
    port: int = Field(default=8090, ge=0, le=65_535)
    """Port that its HTTP server listens at; 0 takes a free one and says which."""


class LoggingSettings(Section):
    """The processor's log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity to write."""
    format: Literal["auto", "text", "json"] = "auto"
    """`auto`: text on a terminal, JSON lines elsewhere."""


class TracingSettings(Section):
    """Traces: spans of records and batches, to a collector by OTLP over HTTP; needs `streamproc[tracing]`."""

    enabled: bool = False
    """Whether to continue the traces of records (their header `traceparent`) and to make spans."""
    endpoint: str | None = None
    """The collector, such as `http://localhost:4318`; by default what OTEL_EXPORTER_OTLP_ENDPOINT says, or that."""
    service_name: str | None = Field(default=None, min_length=1)
    """Whose spans they are; by default what OTEL_SERVICE_NAME says, or the application's name."""
    sample_ratio: float = Field(default=0.001, ge=0, le=1)
    """The share of records without a `traceparent` that begin a trace; where there is one, it decides."""

    @model_validator(mode="after")
    def _is_an_address(self) -> Self:
        if self.endpoint is None:
            return self
        if (parts := _http_address(self.endpoint)) is None:
            raise CrossFieldError(
                "is no address", hint="write it as http://host:4318 or https://host:4318", keys=[("endpoint",)]
            )
        if "@" in parts.netloc:
            raise CrossFieldError(
                "holds credentials, which would be shown",
                hint="send them as a header, by OTEL_EXPORTER_OTLP_HEADERS in the environment",
                keys=[("endpoint",)],
            )
        return self


class Settings(Section):
    """Everything that ``streamproc.yaml`` can say."""

    name: Name
    """The application: the first part of its group ids, client ids and metrics topic."""
    kafka: KafkaSettings = KafkaSettings()
    schema_registry: SchemaRegistrySettings = SchemaRegistrySettings()
    backend: BackendSettings
    pool: PoolSettings = PoolSettings()
    batch: BatchDefaults = BatchDefaults()
    tasks: dict[Name, TaskSettings] = Field(min_length=1)
    topics_dir: SettingsPath = Path("topics")
    """Folder of the declared topics, relative to the settings file; their schemas are checked where it exists."""
    estimates_dir: SettingsPath = Path()
    """Folder of what `streamproc estimate` measured, `<task>.estimate.json`; that of the settings file by default."""
    http: HttpSettings = HttpSettings()
    stats: StatsSettings = StatsSettings()
    logging: LoggingSettings = LoggingSettings()
    tracing: TracingSettings = TracingSettings()
    settings_class: str | None = None
    """`module:Name` of a class made of `streamproc.Settings`, with fields of your own beside these."""
    rebalance_drain_s: float = Field(default=10.0, ge=0)
    """How long records in flight may take to finish when their partition moves to another replica."""
    shutdown_timeout_s: float = Field(default=30.0, gt=0)
    """How long records in flight may take to finish after SIGTERM, before the processor exits without them."""

    @model_validator(mode="before")
    @classmethod
    def _tasks_take_what_the_application_says_of_batches(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("batch"), dict) or not data["batch"]:
            return data
        if not isinstance(tasks := data.get("tasks"), dict):
            return data
        return {**data, "tasks": {name: _with_batch_defaults(task, data["batch"]) for name, task in tasks.items()}}

    @model_validator(mode="after")
    def _topics_do_not_collide(self) -> Self:
        inputs = {topic: task for task, it in self.tasks.items() for topic in it.input.topics}
        results: dict[str, str] = {}
        for task in self.tasks:
            topics = self.topics_of(task)
            here = ("tasks", task)
            if topics.results in results:
                other = results[topics.results]
                raise CrossFieldError(
                    f"tasks {other} and {task} both write results to {topics.results}, where they could not be told "
                    "apart",
                    hint=f"give tasks.{task}.output.topic a name of its own",
                    keys=[(*here, "output", "topic"), ("tasks", other, "output", "topic"), here],
                )
            results[topics.results] = task
            for role, topic in (("output", topics.results), ("metrics", topics.metrics), ("dead_letters", topics.dead)):
                if topic in inputs:
                    loops = inputs[topic] == task or role != "output"
                    raise CrossFieldError(
                        f"{topic} is read by task {inputs[topic]}"
                        + (": the stream would feed itself" if loops else " of the same application"),
                        hint="name another topic" if loops else "chain tasks through applications of their own",
                        keys=[(*here, role, "topic"), ("tasks", inputs[topic], "input", "topics")],
                    )
            if len({topics.results, topics.metrics, topics.dead}) < 3:
                raise CrossFieldError(
                    f"task {task} writes two of results, metrics and dead letters to one topic",
                    hint="name its output.topic, metrics.topic and dead_letters.topic apart",
                    keys=[(*here, "dead_letters", "topic"), (*here, "metrics", "topic"), (*here, "output", "topic")],
                )
        return self

    @model_validator(mode="after")
    def _the_stats_topic_is_its_own(self) -> Self:
        for task in self.tasks:
            topics = self.topics_of(task)
            if self.stats_topic in (*topics.inputs, topics.results, topics.metrics, topics.dead):
                raise CrossFieldError(
                    f"{self.stats_topic} is a topic of task {task} too",
                    hint="name another topic",
                    keys=[("stats", "topic"), ("tasks", task)],
                )
        return self

    @model_validator(mode="after")
    def _formats_have_their_registry(self) -> Self:
        for name, task in self.tasks.items():
            for role, format_ in (("input", task.input.format), ("output", task.output.format)):
                if format_ in REGISTERED and self.schema_registry.url is None:
                    raise CrossFieldError(
                        f"{format_} needs a schema registry, and none is named",
                        hint="set schema_registry.url",
                        keys=[("tasks", name, role, "format"), ("schema_registry",)],
                    )
        return self

    @model_validator(mode="after")
    def _transactions_outlast_commits(self) -> Self:
        for name, task in self.tasks.items():
            if task.delivery == "exactly_once" and task.commit_interval_s * 2_000 > self.kafka.transaction_timeout_ms:
                raise CrossFieldError(
                    f"{self.kafka.transaction_timeout_ms} is less than twice tasks.{name}.commit_interval_ms "
                    f"({task.commit_interval_s * 1_000:g}), so that transactions would be aborted while they are open",
                    hint="raise the one or lower the other",
                    keys=[("kafka", "transaction_timeout_ms"), ("tasks", name, "commit_interval_ms")],
                )
        return self

    @model_validator(mode="after")
    def _waits_fit_the_poll_interval(self) -> Self:
        interval = self.kafka.max_poll_interval_ms
        interval_key = ("kafka", "max_poll_interval_ms")
        for name, task in self.tasks.items():
            if task.batch.max_wait_ms >= interval:
                raise CrossFieldError(
                    f"{task.batch.max_wait_ms:g} is not below kafka.max_poll_interval_ms ({interval}), within which "
                    "Kafka expects progress",
                    hint="lower the wait or raise the interval",
                    keys=[("tasks", name, "batch", "max_wait_ms"), interval_key],
                )
        if self.rebalance_drain_s * 1_000 >= interval:
            raise CrossFieldError(
                f"{self.rebalance_drain_s:g} s is not below kafka.max_poll_interval_ms ({interval} ms), and a replica "
                "that drains for longer is taken out of the group",
                hint="lower the one or raise the other",
                keys=[("rebalance_drain_s",), interval_key],
            )
        if self.kafka.session_timeout_ms > interval:
            raise CrossFieldError(
                f"{self.kafka.session_timeout_ms} is above kafka.max_poll_interval_ms ({interval})",
                hint="lower the one or raise the other",
                keys=[("kafka", "session_timeout_ms"), interval_key],
            )
        return self

    def backend_config(self) -> dict[str, Any]:
        """Keyword arguments for the backend's configuration model; to be overridden, where own fields belong to it."""
        return self.backend.config

    def topics_of(self, task: str) -> TaskTopics:
        """The topics of a task, the ones left out filled in."""
        it = self.tasks[task]
        first = it.input.topics[0]
        return TaskTopics(
            inputs=tuple(it.input.topics),
            results=it.output.topic or f"{first}.results",
            metrics=it.metrics.topic or f"{self.name}.metrics",
            dead=it.dead_letters.topic or f"{first}.dead",
        )

    @property
    def stats_topic(self) -> str:
        """Where `streamproc stats` writes closed windows."""
        return self.stats.topic or f"{self.name}.stats"

    @property
    def stats_group(self) -> str:
        """The consumer group of `streamproc stats`; not one of a task, whose name may be `stats`."""
        return f"{self.name}-stats"

    def group_of(self, task: str) -> str:
        """The consumer group of a task."""
        return f"{self.name}.{task}"


def _with_batch_defaults(task: Any, defaults: dict[str, Any]) -> Any:
    """A task's data, with these where its own section ``batch`` says nothing; what is wrong with them is theirs."""
    own = task.get("batch", {}) if isinstance(task, dict) else None
    if not isinstance(own, dict):
        return task
    try:
        known = BatchDefaults.model_validate(defaults).model_dump(exclude_none=True)
    except ValidationError:
        return task
    if own.get("length") is None:
        known.pop("max_padded", None)
    return {**task, "batch": {**known, **own}}


class TaskTopics(Section):
    """The topics of one task."""

    inputs: tuple[str, ...]
    results: str
    metrics: str
    dead: str


def _secrets(model: type[BaseModel], name: str) -> Iterator[str]:
    """The environment variables of the secrets in a section, in upper case."""
    for field, info in model.model_fields.items():
        below = f"{name}{field.upper()}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _secrets(info.annotation, f"{below}__")
        elif SecretStr in get_args(info.annotation):
            yield below


SECRET_VARIABLES = frozenset(_secrets(Settings, "STREAMPROC_"))
"""The environment variables that hold secrets of ours, in upper case."""
