"""An estimate in words: what was measured, what was chosen and why, and how far to trust it."""

from __future__ import annotations

from collections.abc import Iterator

from streamproc.estimate.measure import Measured
from streamproc.runtime.cost import KNEE_EPSILON
from streamproc.runtime.estimate_file import Estimate

MIB = 1 << 20
WORTH_SAYING = 0.02
"""A share of failed records from which on it is mentioned."""
POOR_TIME, POOR_MEMORY = 0.15, 0.10
_VALUE = "value of "
"""How the setting's words begin where a field is the length itself."""


def explained(measured: Measured) -> Iterator[str]:
    """Sentences."""
    yield from _time(measured)
    yield from _memory(measured)
    yield from _sizes(measured)
    yield from _trust(measured)


def unit_of(length: str | None) -> str:
    """What lengths count, after a number: ``bytes``, ``characters of body``; ``units`` where nobody says."""
    if length is None:
        return ""
    return "units" if length == "backend" or length.startswith(_VALUE) else length


def counted_by(length: str) -> str:
    """The same, or who says how long a record is: after several numbers, or alone."""
    if length == "backend":
        return "by the backend's length method"
    return f"by the field {length.removeprefix(_VALUE)}" if length.startswith(_VALUE) else length


def length_column(length: str | None) -> str:
    """The heading of a column of lengths."""
    unit = unit_of(length)
    return "length" if unit in ("", "units") else unit


def settings_advice(it: Estimate) -> list[str]:
    """Lines for the task's ``batch`` section."""
    lines = [f"max_size: {it.max_size}"]
    if it.max_padded is not None:
        lines.append(f"max_padded: {it.max_padded}")
    return lines


def _time(measured: Measured) -> Iterator[str]:
    it, lengths = measured.estimate.cost, measured.how.lengths
    unit = unit_of(measured.estimate.length)
    parts = [_ms(it.beta_ms)] if it.beta_ms or not (it.gamma_ms or it.delta_ms) else []
    if it.gamma_ms:
        parts.append(f"{_ms(it.gamma_ms * 1_000)} for each 1,000 {unit} that it is padded to")
    if it.delta_ms:
        parts.append(f"{_ms(it.delta_ms * 1e6)} for the square of each 1,000 {unit}")
    yield f"Time: a batch takes {_ms(it.alpha_ms)} whatever is in it, and each record {' and '.join(parts)}."
    middle = round((lengths[0] * lengths[1]) ** 0.5)
    each = it.record_ms(middle)
    knee = round(it.alpha_ms / each * (1 / KNEE_EPSILON - 1)) if each else 0
    if knee > 1:
        of_length = f" of {middle:,} {unit}" if unit else ""
        yield (
            f"From {knee:,} records{of_length} on, what a batch costs whatever is in it is at most {KNEE_EPSILON:.0%} "
            "of its time: waiting for more buys nothing."
        )


def _memory(measured: Measured) -> Iterator[str]:
    it, how = measured.estimate.cost, measured.how
    unit = unit_of(measured.estimate.length)
    parts = [_mib(it.b_bytes)] if it.b_bytes else []
    if it.c_bytes:
        parts.append(f"{_mib(it.c_bytes * 1_000)} for each 1,000 {unit}")
    if it.d_bytes:
        parts.append(f"{_mib(it.d_bytes * 1e6)} for the square of each 1,000 {unit}")
    adds = f", and each record of a batch {' and '.join(parts)}" if parts else ", and batches hardly add to it"
    where = "the device" if how.memory == "cuda" else "a worker"
    yield f"Memory: {where} holds {_mib(it.a_bytes)}{adds}."
    budget = f"The budget is {_mib(how.budget_bytes)} ({how.budget_source})"
    most = how.budget_bytes / measured.estimate.kappa - it.a_bytes
    longest = how.lengths[1]
    each = it.record_bytes(longest)
    if most <= 0:
        yield f"{budget}, of which the idle backend takes {how.idle_bytes / how.budget_bytes:.0%}: nothing is left."
    elif each > 0:
        of_length = f" of {longest:,} {unit}" if unit else ""
        yield f"{budget}: room for {int(most / each):,} records{of_length} at a time."
    else:
        yield f"{budget}, which no batch that was measured comes near."


def _sizes(measured: Measured) -> Iterator[str]:
    it, at_lengths = measured.estimate, measured.how.at_lengths
    ended = sum(at.ended_by == "memory" for at in at_lengths)
    if ended:
        yield f"Memory ended the search at {ended} of {len(at_lengths)} lengths; see the table."
    alone = sum(at.ended_by == "time" and at.largest == 1 for at in at_lengths)
    if alone:
        yield (
            f"At {alone} of {len(at_lengths)} lengths there was time for single records only, which says little of "
            "memory; do not rely on this, and measure again with a longer --time-limit."
        )
    elif any(at.ended_by == "time" and at.best_size == at.largest for at in at_lengths):
        yield (
            "At some lengths time ended the search while larger batches still did more a second; "
            "a longer --time-limit would find how far that goes."
        )
    if it.max_size is not None and it.max_size < max(at.largest for at in at_lengths):
        yield f"More than {it.max_size:,} records at a time do no more a second at any length."
    yield "For the task's batch section: " + ", ".join(settings_advice(it)) + "."


def _trust(measured: Measured) -> Iterator[str]:
    it, how, errors = measured.estimate, measured.how, measured.how.held_out
    if errors.time is not None and errors.memory is not None:
        batch = "" if errors.memory_of_batch is None else f" ({errors.memory_of_batch:.0%} of what the batch adds)"
        yield (
            f"Of {errors.shapes} shapes that it was not fitted to, it was wrong by {errors.time:.1%} in time and by "
            f"{errors.memory:.1%} in memory{batch} on average; memory is multiplied by {it.kappa:.3f} to be safe."
        )
        poor = [
            name
            for name, wrong, limit in (("time", errors.time, POOR_TIME), ("memory", errors.memory, POOR_MEMORY))
            if wrong > limit
        ]
        if poor:
            yield (
                f"That is poor for {' and '.join(poor)}: measure on a quiet machine, with a longer --time-limit, or "
                "see the plot for what the model has no term for."
            )
    if it.length is None:
        yield "batch.length is not set, so that records count as equals; set it where a model pads to the longest."
    elif how.lengths[0] == how.lengths[1]:
        yield f"All samples are {how.lengths[0]:,} {unit_of(it.length)} long: nothing is known of other lengths."
    else:
        least, most = how.lengths
        unit, counted = unit_of(it.length), counted_by(it.length)
        said = unit if unit == counted else f"({counted})"
        yield f"Lengths from {least:,} to {most:,} {said} were measured; beyond, the model is only extended."
    cut = sum(at.cut for at in how.at_lengths)
    if cut:
        yield f"{cut} of {len(how.at_lengths)} lengths had no sample near them: a text of a longer one was cut."
    if measured.failed > WORTH_SAYING * measured.ran:
        share = measured.failed / measured.ran
        yield f"{share:.0%} of the records failed by themselves, and may cost less than others."


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value >= 0.01 or not value else f"{value * 1_000:.3g} µs"


def _mib(value: float) -> str:
    if value >= 1 << 30:
        return f"{value / (1 << 30):.3g} GiB"
    return f"{value / MIB:,.0f} MiB" if value >= 100 * MIB else f"{value / MIB:.3g} MiB"
