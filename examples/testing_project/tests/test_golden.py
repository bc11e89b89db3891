"""What the model says of texts that were looked at once."""

from pathlib import Path

from streamproc.testing import Pipeline, assert_golden

HERE = Path(__file__).parent
TEXTS = ["What a lovely day, thanks!", "The parcel came late and broken.", "It is Tuesday.", ""]


def test_the_scores_are_those_that_were_found_right(pipeline: Pipeline) -> None:
    outputs = pipeline.process([{"text": text} for text in TEXTS])
    assert_golden(outputs, HERE / "golden" / "texts.jsonl", fields={"score": 0.001})
