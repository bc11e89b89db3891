"""``streamproc replay capture``: topics into a file."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from streamproc.cli.kafka_options import BootstrapOption, connected, kafka_settings, run_async
from streamproc.cli.positions import WHERE_HELP, Where, offsets_of, parse_where, partitions_of
from streamproc.cli.terminal import ConfigOption, JsonOption, Progress, UsageError, count_of, print_json, say

if TYPE_CHECKING:
    from streamproc.broker.interface import Admin, Reader
    from streamproc.records import TopicPartition
    from streamproc.replay import capture as capturing
    from streamproc.replay.mask import Masker
    from streamproc.settings import KafkaSettings

app = typer.Typer()

_RULES = "Mask a field: value.user.email=hash, key=fake, headers.session=drop, value.name=redact; may be repeated."


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the command line says of the records; ``texts`` as it says it."""

    topics: list[str]
    begin: Where
    end: Where
    last: int | None
    uncommitted: bool
    texts: dict[str, str]


@app.command(
    epilog="Example: streamproc replay capture orders --last 100000 -o orders.jsonl.gz\n\n"
    "Example: streamproc replay capture orders payments --from 2026-01-31T00:00 --to 2026-02-01T00:00 -o day.parquet "
    "--mask value.user.email=hash --mask key=hash"
)
def capture(
    topics: Annotated[list[str], typer.Argument(metavar="TOPIC", help="The topics to read.")],
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="JSON lines; compressed as *.gz; Parquet as *.parquet."),
    ],
    config: ConfigOption = None,
    bootstrap_servers: BootstrapOption = None,
    begin: Annotated[str, typer.Option("--from", metavar="WHERE", help=f"{WHERE_HELP}.")] = "beginning",
    end: Annotated[
        str,
        typer.Option("--to", metavar="WHERE", help="As --from; the record there is left out. The end is that of now."),
    ] = "end",
    last: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The last N records of all topics together, before --to.")
    ] = None,
    mask: Annotated[list[str] | None, typer.Option(metavar="FIELD=ACTION", help=_RULES)] = None,
    salt_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What hash and fake depend on, so that several captures fit together; made up without.",
        ),
    ] = None,
    mask_unreadable: Annotated[
        Literal["stop", "redact", "keep"],
        typer.Option(help="What to do with a value that is no JSON where a rule names a field in it."),
    ] = "stop",
    uncommitted: Annotated[
        bool, typer.Option("--uncommitted", help="Also what transactions have not committed, or have aborted.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a capture that was interrupted.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE, and what an interrupted capture left.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Capture topics into a file: records in their common order, by time, with all that Kafka knows of them.

    Commits nothing and disturbs no consumer group. FILE is there once it is complete; until then its records are in
    FILE.part. With --bootstrap-servers, no settings file is needed.
    """
    if last is not None and begin != "beginning":
        raise typer.BadParameter("--from and --last exclude each other")
    if resume and force:
        raise typer.BadParameter("--resume and --force exclude each other")
    now = time.time()
    asked = _Asked(
        list(dict.fromkeys(topics)),
        parse_where(begin, now, "--from"),
        parse_where(end, now, "--to"),
        last,
        uncommitted,
        {
            "TOPIC": " ".join(dict.fromkeys(topics)),
            "--from": begin,
            "--to": end,
            "--last": str(last or ""),
            "--uncommitted": str(uncommitted),
            "--mask": " ".join(mask or ()),
        },
    )
    if quiet:
        logging.getLogger("streamproc").setLevel(logging.ERROR)
    from streamproc.runtime.cycles import look_for_cycles_seldom  # noqa: PLC0415 - --help needs it not
    from streamproc.runtime.heap import keep_freed_memory  # noqa: PLC0415 - as above

    look_for_cycles_seldom()
    keep_freed_memory()
    run = _Run(kafka_settings(config, bootstrap_servers), asked, output, quiet=quiet)
    run.prepare(mask or [], salt_file, mask_unreadable, resume=resume, force=force)
    try:
        run_async(run.go)
    except KeyboardInterrupt:
        if not quiet:
            say("interrupted; the same command with --resume goes on")
        raise
    if as_json:
        print_json(run.as_json())


class _Run:
    """One call of the command."""

    def __init__(self, settings: KafkaSettings, asked: _Asked, output: Path, *, quiet: bool) -> None:
        from streamproc.replay import capture as capturing  # noqa: PLC0415 - --help needs no pydantic

        self._settings = settings
        self._asked = asked
        self._quiet = quiet
        self._files = capturing.Files(output)
        self._plan: capturing.Plan | None = None
        self._progress: capturing.Progress | None = None
        self._masker: Masker | None = None
        self._salt = ""
        self._shown = Progress("captured", quiet=quiet)

    @property
    def records(self) -> int:
        """How many records are in the file."""
        return self._progress.records if self._progress is not None else 0

    def as_json(self) -> dict[str, object]:
        """The result, for scripts."""
        masked = {} if self._masker is None else {str(rule): count for rule, count in self._masker.matched.items()}
        return {
            "file": str(self._files.path),
            "records": self.records,
            "captured_now": self._shown.as_json(),
            "masked": masked,
            "partitions": [] if self._plan is None else [it.model_dump() for it in self._plan.bounds],
        }

    def prepare(self, rules: list[str], salt_file: Path | None, unreadable: str, *, resume: bool, force: bool) -> None:
        """Everything that can go wrong without Kafka. Raises StreamprocError."""
        from streamproc.replay import capture as capturing  # noqa: PLC0415 - --help needs no pydantic
        from streamproc.replay.mask import Masker, parse_rule  # noqa: PLC0415 - as above

        parsed = [parse_rule(rule) for rule in rules]
        files = self._files
        plan = files.read_plan() if resume else None
        if files.path.exists() and plan is None and not force:
            what = "there already, and complete" if resume else "there already"
            raise UsageError(f"{files.path}: is {what}; name another file, or replace it with --force")
        if not resume and not force and files.begun():
            raise UsageError(
                f"{files.part}: a capture of this name was interrupted; go on with --resume, or begin anew with --force"
            )
        if resume and plan is None and files.part.exists():
            raise UsageError(
                f"{files.plan}: is missing, so {files.part} cannot be gone on with; begin anew with --force"
            )
        salt = _salt(salt_file) if salt_file is not None else b""
        # A plan that another salt made would hash one text to two.
        self._asked.texts["--salt-file"] = capturing.salted(salt) if salt else ""
        if plan is not None:
            _check_same(plan.asked, self._asked.texts)
            self._salt = plan.salt
            self._plan = plan
        elif parsed and not salt:
            self._salt = secrets.token_hex(16)
        if parsed:
            self._masker = Masker(parsed, salt or bytes.fromhex(self._salt), unreadable)  # type: ignore[arg-type] # Typer has checked it

    async def go(self) -> None:
        """Read and write."""
        from streamproc.broker.admin import KafkaAdmin  # noqa: PLC0415 - --help needs no Kafka client
        from streamproc.broker.reader import KafkaReader  # noqa: PLC0415 - as above
        from streamproc.replay import capture as capturing  # noqa: PLC0415 - as above

        settings, asked = self._settings, self._asked
        async with connected(KafkaAdmin(settings, uncommitted=asked.uncommitted), settings) as admin:
            partitions = await partitions_of(admin, asked.topics)
            async with KafkaReader(
                settings,
                client_id="streamproc-replay",
                uncommitted=asked.uncommitted,
                max_partition_fetch_bytes=capturing.fetch_bytes(len(partitions)),
            ) as reader:
                append = self._plan is not None and self._files.part.exists()
                if self._plan is not None:
                    self._progress = capturing.recover(self._files, self._plan)
                    await self._check_there(admin, self._plan, self._progress)
                else:
                    self._plan = await self._make_plan(admin, reader, partitions)
                    self._files.begin(self._plan)
                    self._progress = capturing.Progress(self._plan.begins)
                begins = self._progress.positions
                total = sum(max(0, end - begins[it]) for it, end in self._plan.ends.items())
                self._shown = Progress("captured", quiet=self._quiet, total=total)
                await capturing.capture(
                    reader,
                    self._plan,
                    self._files,
                    self._progress,
                    masker=self._masker,
                    append=append,
                    on_records=self._shown.add,
                )
            self._shown.finish()
            self._tell(await admin.begin_offsets(partitions))

    async def _make_plan(self, admin: Admin, reader: Reader, partitions: list[TopicPartition]) -> capturing.Plan:
        from streamproc.replay import capture as capturing  # noqa: PLC0415 - --help needs no pydantic

        asked = self._asked
        now = await admin.end_offsets(partitions)
        ends = await offsets_of(asked.end, admin, partitions, now)
        begins = await offsets_of(asked.begin, admin, partitions, now)
        if asked.last is not None:
            if not self._quiet:
                say(f"looking for the last {count_of(asked.last, 'record')} …")
            begins = await capturing.last_begins(reader, begins, ends, asked.last)
        bounds = [
            capturing.Bounds(topic=it.topic, partition=it.partition, begin=begins[it], end=ends[it])
            for it in partitions
        ]
        return capturing.Plan(asked=asked.texts, bounds=bounds, salt=self._salt)

    async def _check_there(self, admin: Admin, plan: capturing.Plan, progress: capturing.Progress) -> None:
        """Raise where what is left of a plan is not in Kafka any more."""
        from streamproc.replay.capture import CaptureError  # noqa: PLC0415 - --help needs no pydantic

        partitions = list(plan.ends)
        begins, ends = await admin.begin_offsets(partitions), await admin.end_offsets(partitions)
        for it in partitions:
            where = f"topic {it.topic}, partition {it.partition}"
            if plan.ends[it] > ends[it]:
                raise CaptureError(
                    f"{where} ends at offset {ends[it]:,}, and the interrupted capture goes to {plan.ends[it]:,}: this "
                    f"is another Kafka, or the topic was made anew; begin anew with --force"
                )
            if progress.positions[it] < min(begins[it], plan.ends[it]):
                raise CaptureError(
                    f"{where} begins at offset {begins[it]:,} by now, and the interrupted capture would go on at "
                    f"{progress.positions[it]:,}: retention has removed what is between; begin anew with --force"
                )

    def _tell(self, begins: Mapping[TopicPartition, int]) -> None:
        """What the person who asked should know of the result."""
        if self._progress is None or self._quiet:
            return
        for sentence in self._progress.lost(begins):
            say(f"warning: {sentence}")
        if self._masker is not None and self._shown.count:
            for rule, count in self._masker.matched.items():
                if not count:
                    say(f"warning: --mask {rule} has matched nothing in {count_of(self._shown.count, 'record')}")
        asked = self._asked.last
        if asked is not None and self.records < asked:
            say(f"the topics hold no more than {count_of(self.records, 'record')} there")
        if self.records > self._shown.count:
            say(f"{self._files.path} has {count_of(self.records, 'record')} with those from before the interruption")


def _salt(path: Path) -> bytes:
    try:
        salt = path.read_bytes().strip()
    except OSError as error:
        raise UsageError(f"--salt-file {path}: cannot be read ({error.strerror})") from error
    if len(salt) < 8:
        raise UsageError(f"--salt-file {path}: needs 8 bytes or more; make one with `openssl rand -hex 16`")
    return salt


def _check_same(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for option, text in now.items():
        if before.get(option) != text:
            was = f"was {before.get(option)}" if before.get(option) else "was not given"
            if option == "--salt-file":
                was = "was another, or none"
            raise UsageError(
                f"{option} {was} when the capture was begun; --resume goes on with the same, --force begins anew"
            )
