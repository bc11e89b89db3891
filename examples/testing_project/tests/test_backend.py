"""The backend alone: no processes, no topics."""

import pytest

from streamproc import RecordError, Settings
from streamproc.testing import run_backend


@pytest.mark.parametrize(("text", "score"), [("Lovely, thanks!", 1.0), ("It was late.", -0.3333), ("Tuesday", 0.0)])
def test_good_words_count_against_bad_ones(streamproc_settings: Settings, text: str, score: float) -> None:
    assert run_backend(streamproc_settings, [{"text": text}]) == [{"text": text, "score": score}]


def test_a_text_without_words_is_refused_and_the_others_are_not(streamproc_settings: Settings) -> None:
    first, refused, last = run_backend(streamproc_settings, [{"text": "good"}, {"text": " "}, {"text": "bad"}])
    assert isinstance(refused, RecordError)
    assert [first, last] == [{"text": "good", "score": 1.0}, {"text": "bad", "score": -1.0}]
