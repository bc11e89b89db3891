"""The cheapest way to divide records of known lengths into batches: an exact planner, in O(W log W).

Records, or groups of records that stay together, are sorted by length, shortest first, and numbered from 1; C_i counts
the records of the first i. A batch of j+1 … i is padded to ℓ_i, and the cheapest division of the first i is

    f(i) = min over lo(i) ≤ j < i of  f(j) + w(j, i),      w(j, i) = α + (C_i - C_j)·h(ℓ_i)

where lo(i) is how far back the limits let a batch that ends at i reach. For single records C_i is i, and only runs of
the sorted order need be looked at: of two batches, give the one with the longest record the longest of both, as many
as it had, and the other the rest. The first is padded to what it was, the second to no more, neither has more records
than before, and n_max does not grow with length: it fits, and is not dearer. (A limit on bytes breaks this, since short
records may have many bytes. Then the answer is the best division into runs of the sorted order.)

**Why a monotone queue finds it.** For j < k let

    D(i) = [f(j) + w(j, i)] - [f(k) + w(k, i)] = f(j) - f(k) + (C_k - C_j)·h(ℓ_i)

h(ℓ_i) does not fall with i, so neither does D: once k is no worse than j, it stays so (w is Monge:
w(j, i) + w(k, i') ≤ w(j, i') + w(k, i) for j < k < i < i'). The limits keep that. lo does not fall with i: n_max(ℓ_i)
does not grow, so C_i - n_max(ℓ_i) rises, and so does the bound by bytes, since sums over records only grow; the smaller
of either and i - 1 (one always goes, alone if it must) still does not fall. So j leaves the range before k does, and a
j that has left counts as infinitely dear: from then on k is better, for good. The matrix is totally monotone. Hence
each pair has one index from which on k wins,

    overtakes(j, k) = the first i with h(ℓ_i) ≥ (f(k) - f(j)) / (C_k - C_j), or with lo(i) > j

found by bisection. A queue of candidates is kept in which each overtakes the one before it later than that one
overtook its own; one in the middle that would be overtaken before it overtakes is never best, and is dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from streamproc.runtime.limits import Limits


def reach(
    lengths: Sequence[int], totals: Sequence[int], limits: Limits, *, byte_totals: Sequence[int] | None = None
) -> list[int]:
    """lo(i) for i from 0: the least j such that j+1 … i may be one batch.

    Args:
        lengths: In order.
        totals: C_i, from 0 on: one more than there are lengths.
        limits: What a batch may hold.
        byte_totals: As ``totals``, of the bytes; None where they do not matter.
    """
    lows = [0]
    n_max, before, most, low, reached = limits.n_max, -1, 0, 0, totals[0]
    for stop, (length, total) in enumerate(zip(lengths, totals[1:], strict=True), 1):
        if length != before:
            before, most = length, n_max(length)
        least = total - most
        while reached < least and low < stop - 1:
            low += 1
            reached = totals[low]
        lows.append(low)
    if byte_totals is not None:
        low = 0
        for stop in range(1, len(lows)):
            least = byte_totals[stop] - limits.max_bytes
            while low < stop - 1 and byte_totals[low] < least:
                low += 1
            lows[stop] = max(low, lows[stop])
    return lows


def cheapest_division(
    costs_ms: Sequence[float], totals: Sequence[int], alpha_ms: float, lows: Sequence[int]
) -> tuple[list[int], float]:
    """The ends of the batches, in order, and the time of all together.

    Args:
        costs_ms: h(ℓ_i), in order of length.
        totals: C_i, from 0 on.
        alpha_ms: What a batch costs whatever is in it.
        lows: From ``reach``.
    """
    count = len(costs_ms)
    best = [0.0] * (count + 1)
    begin = [0] * (count + 1)
    # The index from which on the limits do not let a batch reach back to each: the first i with lo(i) > j.
    expires = [count + 1] * (count + 1)
    before = 0
    for stop, low in enumerate(lows):
        if low != before:
            expires[before:low] = [stop] * (low - before)
            before = low
    # Candidates, and for each the index from which on it beats the one before it.
    queue, since = [0], [0]
    head = last = 0
    for stop, (cost_ms, total) in enumerate(zip(costs_ms, totals[1:], strict=True), 1):
        while head < last and since[head + 1] <= stop:
            head += 1
        begin[stop] = start = queue[head]
        best[stop] = found = best[start] + alpha_ms + (total - totals[start]) * cost_ms
        while True:
            back = queue[last]
            slope = (found - best[back]) / (total - totals[back])
            # Not looked for beyond the expiry: there it overtakes at the latest.
            overtakes = bisect_left(costs_ms, slope, stop, expires[back] - 1) + 1
            if last == head or overtakes > since[last]:
                break
            del queue[last], since[last]
            last -= 1
        if overtakes <= count:
            queue.append(stop)
            since.append(overtakes)
            last += 1
    ends = []
    at = count
    while at:
        ends.append(at)
        at = begin[at]
    return ends[::-1], best[count]
