"""``streamproc replay test``: a capture through the running processor, its results against golden ones, in one go.

What ``replay run --wait-for`` and ``replay diff`` do, one after the other, with what the settings know: the task's
group and topics. For a release's gate, and for docker-compose.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Annotated

import typer

from streamproc.cli import replay_diff, replay_run
from streamproc.cli.positions import Where
from streamproc.cli.replay_diff import (
    DEFAULT_ABS,
    DEFAULT_REL,
    AbsTolOption,
    ExamplesOption,
    HtmlOption,
    IgnoreOption,
    LimitOption,
    RelTolOption,
    ToleranceOption,
)
from streamproc.cli.replay_run import task_of
from streamproc.cli.terminal import ConfigOption, JsonOption

app = typer.Typer()

CLOCKS_APART_S = 300.0
"""Results are looked for from so long before the run on: another machine's clock may be behind."""


@app.command(
    "test",
    epilog="Example: streamproc replay test day.jsonl.gz --golden golden.jsonl.gz\n\n"
    "Example: streamproc replay test day.jsonl.gz --golden golden.jsonl.gz --tolerance score=0.01 --html report.html",
)
def against_golden(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A capture of the task's input topic.")],
    *,
    golden: Annotated[
        Path, typer.Option(metavar="FILE", help="The results that are expected: a capture of a results topic.")
    ],
    golden_dead: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The dead letters that are expected, where there are any.")
    ] = None,
    config: ConfigOption = None,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="The task, where there are several.")] = None,
    wait_timeout: Annotated[
        float, typer.Option(metavar="S", min=0, help="Fail when the task has committed nothing for so many seconds.")
    ] = replay_run.WAIT_TIMEOUT_S,
    abs_tol: AbsTolOption = DEFAULT_ABS,
    rel_tol: RelTolOption = DEFAULT_REL,
    tolerance: ToleranceOption = None,
    ignore: IgnoreOption = None,
    max_changed: LimitOption = "0",
    examples: ExamplesOption = 3,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay a capture into the input topic of a running processor, and compare what comes of it with golden results.

    Writes as fast as possible, under a run id of its own, and waits until the task has committed everything. The exit
    code is 1 where more records differ than --max-changed allows. Make the golden file with
    `streamproc replay run FILE --backend -o GOLDEN`, or capture a results topic that was found to be right.
    """
    from streamproc.replay.capture_file import read_capture  # noqa: PLC0415 - --help needs it not
    from streamproc.replay.run import make_run_id  # noqa: PLC0415 - as above
    from streamproc.settings_loading import load_settings  # noqa: PLC0415 - as above

    # Before anything is written, since what is wrong with these is wrong from the beginning.
    options = replay_diff.comparison_options(
        abs_tol=abs_tol,
        rel_tol=rel_tol,
        tolerance=tolerance,
        ignore=ignore,
        max_changed=max_changed,
        examples=examples,
        html=html,
        as_json=as_json,
    )
    for expected in (golden, golden_dead):
        if expected is not None:
            next(read_capture(expected), None)
    settings = load_settings(config, os.environ)
    name = task_of(settings, task)
    topics = settings.topics_of(name)
    begun = time.time()
    run = make_run_id(begun, random.SystemRandom())
    replay_run.run(
        file,
        to=topics.inputs[0] if len(topics.inputs) == 1 else None,
        config=config,
        as_fast=True,
        timestamps="now",
        run_id=run,
        into_source=True,
        wait_for=[settings.group_of(name)],
        wait_timeout=wait_timeout,
    )
    replay_diff.compare(
        [str(it) for it in (golden, golden_dead) if it is not None],
        [f"{topics.results}@{run}", f"{topics.dead}@{run}"],
        options,
        lambda: settings.kafka,
        begin=Where(time_ms=int((begun - CLOCKS_APART_S) * 1_000)),
    )
