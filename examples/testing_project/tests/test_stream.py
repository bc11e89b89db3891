"""The whole pipeline in memory, and what it does when things break."""

from streamproc.testing import Pipeline


def test_every_text_has_a_score(pipeline: Pipeline) -> None:
    outputs = pipeline.process([{"text": "What a lovely day"}, {"text": "It is Tuesday"}], key="text")
    assert [value["score"] for value in outputs.values] == [0.25, 0.0]
    assert outputs.results[0].key == b"What a lovely day"
    assert sum(pipeline.offsets().values()) == 2


def test_what_cannot_be_scored_becomes_a_dead_letter_that_says_why(pipeline: Pipeline) -> None:
    outputs = pipeline.process([{"text": "good"}, {"text": 5}, {"text": ""}, b"no JSON"])
    assert outputs.values == [{"text": "good", "score": 1.0}]
    assert [letter.cause for letter in outputs.dead_letters] == ["invalid", "rejected", "invalid"]
    assert outputs.dead_letters[1].message == "there are no words in it"


def test_a_worker_that_is_killed_costs_nothing(pipeline: Pipeline) -> None:
    pipeline.send([{"text": "good"}] * 100)
    pipeline.kill_worker()
    pipeline.settle()
    assert len(pipeline.outputs().values) == 100


def test_partitions_that_move_and_commits_that_are_refused_lose_nothing(pipeline: Pipeline) -> None:
    pipeline.send([{"text": "good"}] * 100)
    pipeline.refuse_commits(1)
    pipeline.move_partitions()
    pipeline.settle()
    assert {result.source for result in pipeline.outputs().results} == {
        ("sentiment.text", partition, offset) for partition in range(2) for offset in range(50)
    }
