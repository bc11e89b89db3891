"""Batches of wanted shapes, made of samples."""

from __future__ import annotations

import random
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.estimate.samples import NEAR, Samples, measure_of
from streamproc.settings import LengthSettings

BYTES = measure_of(LengthSettings(of="bytes"), by_backend=len)
TEXT = "the quick brown fox jumps over the lazy dog "


def record(chars: int) -> dict[str, object]:
    return {"id": 7, "doc": {"text": (TEXT * 50)[:chars], "tags": ["a", "b"]}}


def test_a_record_without_a_length_counts_as_one() -> None:
    assert measure_of(None, by_backend=len)(record(10)) == 1


def test_bytes_are_those_of_the_value() -> None:
    assert BYTES({"a": "é"}) == len('{"a":"é"}'.encode())


def test_other_lengths_are_the_backends() -> None:
    assert measure_of(LengthSettings(of="backend"), by_backend=lambda it: len(it["id"]))({"id": "four"}) == 4


def test_records_without_a_length_are_left_out() -> None:
    measure = measure_of(LengthSettings(of="field", field="text"), by_backend=len)
    samples = Samples([{"text": "four"}, {"id": 1}, {"text": None}, {"text": "eight..."}], measure)
    assert (samples.count, samples.reach) == (2, (4, 8))


def test_without_samples_there_is_nothing_to_make_batches_of() -> None:
    with pytest.raises(ValueError, match="no sample record"):
        Samples([], BYTES)


@given(st.lists(st.integers(0, 1_500), min_size=1, max_size=30), st.integers(1, 1_600), st.integers(1, 40))
def test_no_batch_has_a_longer_record_than_its_longest_and_all_are_near_it(
    chars: list[int], wanted: int, size: int
) -> None:
    samples = Samples([record(it) for it in chars], BYTES)
    length = samples.near(wanted).length
    batch = samples.batch(size, length, random.Random(1))
    lengths = [BYTES(it) for it in batch]
    assert len(batch) == size
    assert max(lengths) == samples.longest(batch) <= length
    assert min(lengths) * NEAR >= length


@given(st.lists(st.integers(0, 1_500), min_size=1, max_size=30), st.integers(1, 10))
def test_lengths_go_from_the_shortest_to_the_longest_and_none_is_beyond_the_samples(
    chars: list[int], count: int
) -> None:
    samples = Samples([record(it) for it in chars], BYTES)
    least, most = samples.reach
    lengths = samples.lengths(count)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == most
    assert lengths[0] == least or count < 2
    assert len(lengths) <= count + 1
    assert all(samples.near(it).length == it for it in lengths)


def test_a_length_that_no_sample_has_is_cut_from_a_longer_one() -> None:
    samples = Samples([record(20), record(1_000)], BYTES)
    found = samples.near(400)
    assert found.cut
    assert 400 / NEAR <= found.length <= 400
    text = found.record["doc"]["text"]
    assert (TEXT * 50).startswith(text)
    assert orjson.loads(orjson.dumps(found.record)) == {**record(0), "doc": {"text": text, "tags": ["a", "b"]}}
    assert record(1_000)["doc"] == {"text": (TEXT * 50)[:1_000], "tags": ["a", "b"]}, "the sample is as it was"


def test_a_sample_that_is_near_is_not_cut() -> None:
    samples = Samples([record(380), record(1_000)], BYTES)
    assert not samples.near(BYTES(record(380)) + 10).cut


def test_what_is_no_text_is_not_cut() -> None:
    short, long = {"pixels": [1, 2]}, {"pixels": list(range(200))}
    samples = Samples([short, long], BYTES)
    assert samples.near(100).record in (short, long)
    assert samples.lengths(8) == [BYTES(short), BYTES(long)]


def test_a_record_whose_length_is_not_in_one_text_is_not_cut() -> None:
    texts = {"lines": [TEXT] * 20}
    assert not Samples([{"lines": []}, texts], BYTES).near(300).cut


def test_the_shortest_of_many_samples_is_not_measured() -> None:
    samples = Samples([record(it) for it in (0, *range(200, 400))], BYTES)
    assert samples.lengths(8)[0] > BYTES(record(150))


def test_many_samples_give_lengths_in_about_equal_ratios() -> None:
    lengths = Samples([record(it) for it in range(0, 1_500, 5)], BYTES).lengths(8)
    ratios = [longer / shorter for shorter, longer in pairwise(lengths)]
    assert max(ratios) / min(ratios) < 1.4
