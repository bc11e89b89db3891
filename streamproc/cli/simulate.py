"""``streamproc simulate``: a stream of lengths and arrival times against the batching strategies, in simulated time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from streamproc.cli.terminal import JsonOption, UsageError, print_json, print_table, say, stdout
from streamproc.errors import StreamprocError

if TYPE_CHECKING:
    from streamproc.runtime.estimate_file import Estimate
    from streamproc.simulation.comparison import Comparison
    from streamproc.simulation.streams import Stream

app = typer.Typer()

_MIB = 1_048_576
_ALPHA_MS, _BETA_MS, _GAMMA_MS, _DELTA_MS = 5.0, 0.02, 0.002, 0.000_002


@app.command(
    epilog="Example: streamproc simulate --stream lognormal --rate 400 --max-padded 16384 --plot batching.svg\n\n"
    "Example: streamproc simulate --capture texts.jsonl.gz --field text --estimate estimate.json --workers 2"
)
def simulate(
    *,
    stream: Annotated[
        Literal["lognormal", "bimodal", "pareto", "uniform"],
        typer.Option(metavar="NAME", help="Synthetic lengths: lognormal, bimodal, pareto or uniform."),
    ] = "lognormal",
    records: Annotated[int, typer.Option(metavar="N", min=1, help="Records of a synthetic stream.")] = 20_000,
    longest: Annotated[int, typer.Option(metavar="L", min=1, help="Synthetic lengths are cut here.")] = 1_024,
    seed: Annotated[int, typer.Option(metavar="N", help="Of lengths, arrivals and noise.")] = 1,
    lengths: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lengths, one whole number a line, in order of arrival.")
    ] = None,
    capture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Records that `streamproc replay capture` wrote.")
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --capture: the field whose length counts, a.b for one below another; else the value's bytes.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Records a second, arriving independently.",
            show_default="the timestamps of --capture; else everything is there at once",
        ),
    ] = None,
    backlog: Annotated[bool, typer.Option("--backlog", help="Everything is there at once.")] = False,
    strategy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="none, fifo, bucketed or exact; may be repeated.", show_default="all"),
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="As pool.workers.")] = 1,
    max_size: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="As batch.max_size.")] = 64,
    max_wait_ms: Annotated[float, typer.Option(metavar="MS", min=0, help="As batch.max_wait_ms.")] = 20.0,
    max_padded: Annotated[int | None, typer.Option(metavar="N", min=1, help="As batch.max_padded.")] = None,
    target_latency_ms: Annotated[
        float | None,
        typer.Option(metavar="MS", min=0.001, help="As batch.target_latency_ms; tells how many records keep it."),
    ] = None,
    memory_budget_mb: Annotated[
        float | None,
        typer.Option(metavar="MIB", min=0, help="Most memory of a batch, by the model of --estimate."),
    ] = None,
    estimate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The cost model that was measured of a backend.")
    ] = None,
    alpha_ms: Annotated[
        float | None, typer.Option(metavar="MS", min=0, help="Time of a batch, whatever is in it.", show_default="5")
    ] = None,
    beta_ms: Annotated[
        float | None, typer.Option(metavar="MS", min=0, help="Time of a record.", show_default="0.02")
    ] = None,
    gamma_ms: Annotated[
        float | None,
        typer.Option(metavar="MS", min=0, help="Time of a unit of a record's padded length.", show_default="0.002"),
    ] = None,
    delta_ms: Annotated[
        float | None, typer.Option(metavar="MS", min=0, help="Time of its square.", show_default="0.000002")
    ] = None,
    noise: Annotated[
        float, typer.Option(metavar="S", min=0, help="Standard deviation of the logarithm of a batch's time.")
    ] = 0.0,
    handover_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            min=0,
            help="How long a batch is on its way to a worker that has none queued, and stands still.",
        ),
    ] = 0.5,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw throughput, padding, and p99 by load, as SVG.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare batching strategies on a stream, without Kafka and without a backend.

    The processor's own batchers run in simulated time, and a cost model stands for the workers: a batch of n records,
    the longest L, takes alpha + n × (beta + gamma × L + delta × L²). The optimum divides all records at once, sorted,
    into the cheapest batches that the limits allow; no batcher can do better.
    """
    from streamproc.runtime.cost import CostModel  # noqa: PLC0415 - --help needs none of it
    from streamproc.runtime.estimate_file import read_estimate  # noqa: PLC0415 - as above
    from streamproc.simulation.comparison import STRATEGIES, Batching, by_load, compare  # noqa: PLC0415 - as above
    from streamproc.simulation.simulator import Workers  # noqa: PLC0415 - as above
    from streamproc.simulation.streams import at_once, poisson, synthetic_lengths  # noqa: PLC0415 - as above

    _check(lengths=lengths, capture=capture, field=field, rate=rate, backlog=backlog)
    strategies = [it for it in STRATEGIES if not strategy or it in strategy]
    if unknown := set(strategy or ()) - set(STRATEGIES):
        raise UsageError(f"--strategy {unknown.pop()}: there are {', '.join(STRATEGIES)}")
    measured = read_estimate(estimate) if estimate is not None else None
    given = (alpha_ms, beta_ms, gamma_ms, delta_ms)
    if measured is not None and any(it is not None for it in given):
        raise UsageError("--estimate has a model already: leave out --alpha-ms and the others")
    defaults = (_ALPHA_MS, _BETA_MS, _GAMMA_MS, _DELTA_MS)
    try:
        cost = measured.cost if measured is not None else CostModel(
            *(default if it is None else it for it, default in zip(given, defaults, strict=True))
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"--alpha-ms and the others: {error}") from None
    captured = _captured(capture, field) if capture is not None else None
    if captured is not None:
        chosen = captured.lengths
    elif lengths is not None:
        from streamproc.simulation.captured import read_lengths  # noqa: PLC0415 - as above

        chosen = read_lengths(lengths)
    else:
        chosen = synthetic_lengths(stream, records, seed, longest=longest)
    if rate is not None:
        arriving = poisson(chosen, rate, seed)
    else:
        arriving = captured if captured is not None and not backlog else at_once(chosen)
    batching = Batching(
        max_size, max_wait_ms, max_padded, _budget_bytes(memory_budget_mb, measured),
        measured.kappa if measured is not None else 1.0, target_latency_ms,
    )  # fmt: skip
    found = compare(arriving, batching, Workers(cost, workers, noise, seed, handover_ms), strategies)
    if as_json:
        print_json(found.as_json())
    else:
        _show(found)
    if plot is not None:
        from streamproc.simulation.plot import plot as draw  # noqa: PLC0415 - as above

        source = capture or lengths
        title = f"{found.optimum.records:,} records, {stream if source is None else source.name}"
        drawing = draw(found, by_load(chosen, found, batching, seed), title)
        try:
            plot.write_text(drawing, encoding="utf-8")
        except OSError as error:
            raise StreamprocError(f"{plot}: cannot be written ({error.strerror})") from error
        say(f"plot in {plot}")


def _check(*, lengths: Path | None, capture: Path | None, field: str | None, rate: float | None, backlog: bool) -> None:
    if lengths is not None and capture is not None:
        raise UsageError("--lengths and --capture are two streams: give one of them")
    if field is not None and capture is None:
        raise UsageError("--field is for the records of --capture")
    if rate is not None and backlog:
        raise UsageError("--rate and --backlog are two ways to arrive: give one of them")
    if rate is not None and rate <= 0:
        raise UsageError(f"--rate {rate:g}: it has to be above 0")


def _captured(path: Path, field: str | None) -> Stream:
    from streamproc.simulation.captured import read_captured  # noqa: PLC0415 - as above

    return read_captured(path, field)


def _budget_bytes(budget_mb: float | None, measured: Estimate | None) -> float | None:
    if budget_mb is None:
        return None
    if measured is None or measured.memory is None:
        raise UsageError("--memory-budget-mb needs --estimate, with a model of memory")
    return budget_mb * _MIB


def _show(found: Comparison) -> None:
    best, count = found.optimum, found.workers.count
    rows = [
        (
            name,
            f"{run.per_s:,.0f}",
            f"{found.share(name):.1%}",
            f"{run.padding_ratio:.3f}",
            f"{run.latency_ms(0.5):,.1f}",
            f"{run.latency_ms(0.99):,.1f}",
            *(() if (within := found.within(name)) is None else (f"{within:.1%}",)),
            f"{run.worker_ms / 1_000:,.1f}",
            f"{run.batches:,}",
            ", ".join(f"{rule} {batches:,}" for rule, batches in sorted(run.closed_by.items(), key=lambda it: -it[1])),
        )
        for name, run in found.runs.items()
    ]
    target = () if found.target_latency_ms is None else (f"within {found.target_latency_ms:g} ms",)
    optimum = ("optimum", f"{best.per_s(count):,.0f}", "100.0%", f"{best.padding_ratio:.3f}", "-", "-",
               *("-" for _ in target), f"{best.worker_ms / 1_000:,.1f}", f"{best.batches:,}", "")  # fmt: skip
    columns = ("strategy", "records/s", "of optimum", "padding", "p50 ms", "p99 ms", *target,
               "worker s", "batches", "closed by")  # fmt: skip
    print_table(columns, [*rows, optimum], right=columns[1:-1], whole=("strategy",), spare=("closed by",))
    stdout.print("")
    stdout.print(
        "records/s: to the end of the last batch. of optimum: the time of the optimum's batches over its own. padding: "
        "padded length over length.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
