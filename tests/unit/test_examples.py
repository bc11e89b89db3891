"""The examples: their backends answer rightly, their settings load, their topics are valid, their texts are true."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from streamproc import RecordError
from streamproc.broker.topics import load_topics
from streamproc.loaders import LocalLoader, ModuleLoader
from streamproc.settings_loading import load_settings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SETTINGS = [*sorted(EXAMPLES.glob("*/streamproc.yaml")), ROOT / "streamproc" / "demo" / "streamproc.yaml"]
NAMES = [path.parent.name for path in SETTINGS]


@pytest.fixture
def _imports_forgotten() -> Iterator[None]:
    """Loading an example puts its folder on the path and its modules under names that others use too."""
    path, modules = sys.path.copy(), sys.modules.copy()
    yield
    sys.path[:] = path
    for name in ("inference", "encoders"):
        if name in modules:
            sys.modules[name] = modules[name]
        else:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As in a worker. On a busy machine, threads that wait for each other take ten times as long for such models."""
    if importlib.util.find_spec("threadpoolctl") is None:  # it comes with scikit-learn
        yield
    else:
        with importlib.import_module("threadpoolctl").threadpool_limits(1):
            yield


def load(settings_file: Path) -> Any:
    backend = load_settings(settings_file, {}).backend
    if backend.loader == "module":
        return ModuleLoader(backend.path).load(**backend.config)
    return LocalLoader(backend.path, backend.base_dir).load(**backend.config)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


@pytest.mark.parametrize("settings_file", SETTINGS, ids=NAMES)
def test_the_settings_load_and_the_declared_topics_are_valid(settings_file: Path) -> None:
    settings = load_settings(settings_file, {})
    declared = load_topics(settings.topics_dir)
    if declared:
        inputs = {topic for task in settings.tasks for topic in settings.topics_of(task).inputs}
        assert all(declared[topic].samples for topic in inputs)


def test_the_declared_topics_are_those_that_the_digits_application_uses() -> None:
    settings = load_settings(EXAMPLES / "digits" / "streamproc.yaml", {})
    topics = settings.topics_of("digits")
    declared = load_topics(settings.topics_dir)
    assert set(declared) == {*topics.inputs, topics.results, topics.metrics, topics.dead}
    assert declared["digits"].partitions == declared["digits.results"].partitions
    assert len(declared["digits"].samples) == 50
    assert declared["digits"].schema_document is not None


def test_the_digits_example_documents_every_section_of_the_settings_that_it_needs() -> None:
    text = (EXAMPLES / "digits" / "streamproc.yaml").read_text(encoding="utf-8")
    for section in ("name", "kafka", "backend", "pool", "tasks", "topics_dir", "http", "logging"):
        assert re.search(rf"^{section}:", text, re.MULTILINE), section


# -- digits


@pytest.fixture(scope="module")
def digits() -> Any:
    pytest.importorskip("sklearn", reason="the extra is not installed: pip install 'streamproc[demo]'")
    return load(EXAMPLES / "digits" / "streamproc.yaml")


def test_digits_reads_most_images_right(digits: Any) -> None:
    from streamproc.demo.inference import IMAGES, sample_records

    records = sample_records()
    outputs = digits(records)
    assert len(records) == len(outputs) == IMAGES
    assert [output["id"] for output in outputs] == list(range(IMAGES))
    right = sum(output["digit"] == output["label"] for output in outputs)
    assert 0.94 < right / IMAGES < 0.96, "the README and the demo say 94.8 %"
    assert all(0 <= output["probability"] <= 1 for output in outputs)


def test_digits_passes_its_own_samples_and_has_the_declared_keys(digits: Any) -> None:
    samples = read_lines(ROOT / "topics" / "samples" / "digits.jsonl")
    outputs = digits.check_io(samples)
    assert all(set(output) == set(digits.config.output_keys) for output in outputs)
    assert [output["label"] for output in outputs] == [sample["label"] for sample in samples]


def test_the_sample_file_holds_real_images() -> None:
    pytest.importorskip("sklearn", reason="the extra is not installed: pip install 'streamproc[demo]'")
    from streamproc.demo.inference import sample_records

    images = sample_records()
    for sample in read_lines(ROOT / "topics" / "samples" / "digits.jsonl"):
        assert sample == images[sample["id"]]


def test_no_image_is_answered_by_a_model_that_has_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the extra is not installed: pip install 'streamproc[demo]'")
    import numpy as np

    from streamproc.demo import inference

    class Recorder:
        """A model that remembers what it was shown."""

        def __init__(self, images: Any) -> None:
            self.seen = {row.tobytes() for row in images}

        def predict_proba(self, values: Any) -> Any:
            assert not self.seen & {row.tobytes() for row in values * inference.MOST_INK}
            return np.full((len(values), 10), 0.1)

    monkeypatch.setattr(inference, "train", lambda images, *_: Recorder(images))
    backend = inference.Backend()
    outputs = backend(inference.sample_records())
    assert len(outputs) == inference.IMAGES
    assert sum(len(model.seen) for model in backend.models) == inference.IMAGES, "all images are used for training"


def test_digits_gives_the_same_answers_on_every_start(digits: Any) -> None:
    samples = read_lines(ROOT / "topics" / "samples" / "digits.jsonl")
    assert load(EXAMPLES / "digits" / "streamproc.yaml")(samples) == digits(samples)


def test_digits_answers_an_image_of_ones_own_without_id_or_label(digits: Any) -> None:
    pixels = read_lines(ROOT / "topics" / "samples" / "digits.jsonl")[0]["pixels"]
    output = digits({"pixels": pixels})
    assert (output["id"], output["label"], output["digit"]) == (None, None, 0)


# -- image_text


@pytest.fixture
def image_text(_imports_forgotten: None) -> Any:
    pytest.importorskip("sklearn", reason="the extra is not installed: pip install 'streamproc[demo]'")
    return load(EXAMPLES / "image_text" / "streamproc.yaml")


@pytest.mark.parametrize("task", ["image", "text"])
def test_image_text_reads_all_samples_but_one_of_each_task(image_text: Any, task: str) -> None:
    samples = read_lines(EXAMPLES / "image_text" / "topics" / "samples" / f"{task}.jsonl")
    outputs = image_text.task(task).check_io(samples)
    wrong = [output for output in outputs if output["digit"] != output["label"]]
    assert len(outputs) == 20
    assert [output["digit"] for output in wrong] == [None]
    assert [output["id"] for output in outputs] == [sample["id"] for sample in samples]


def test_image_text_loads_its_weights_once_for_both_tasks(image_text: Any) -> None:
    assert image_text.task_names == ("image", "text")
    assert image_text.task("image").backend.encoders is image_text.task("text").backend.encoders


def test_the_settings_of_one_task_go_over_those_of_both(image_text: Any) -> None:
    assert image_text.task("image").config.decimals == 3
    assert image_text.task("text").config.decimals == 4


def test_an_image_and_a_word_for_it_are_near_each_other(image_text: Any) -> None:
    samples = EXAMPLES / "image_text" / "topics" / "samples"
    image = next(record for record in read_lines(samples / "image.jsonl") if record["label"] == 4)
    near, far = (image_text.task("text")({"id": word, "text": word})["vector"] for word in ("vier", "zero"))
    vector = image_text.task("image")(image)["vector"]

    def similarity(other: list[float]) -> float:
        return float(sum(a * b for a, b in zip(vector, other, strict=True)))

    assert similarity(near) > 0.8
    assert similarity(far) < 0.2


# -- first_backend


@pytest.mark.usefixtures("_imports_forgotten")
def test_the_first_backend_scores_its_texts() -> None:
    backend = load(EXAMPLES / "first_backend" / "streamproc.yaml")
    outputs = backend.check_io(read_lines(EXAMPLES / "first_backend" / "texts.jsonl"))
    assert [output["score"] for output in outputs] == [1.0, -1.0, 0.0]


def test_the_first_backend_needs_nothing_but_python_and_streamproc() -> None:
    code = (EXAMPLES / "first_backend" / "inference.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) == {"typing", "streamproc"}


# -- faust_application


@pytest.mark.usefixtures("_imports_forgotten")
def test_the_backend_of_the_faust_application_tells_languages() -> None:
    backend = LocalLoader("inference:Backend", base_dir=EXAMPLES / "faust_application").load()
    english, german, none = backend([{"text": "it was in the house"}, {"text": "das ist die Katze"}, {"text": ""}])
    assert (english["language"], german["language"]) == ("en", "de")
    assert isinstance(none, RecordError)


# -- sentences


def test_the_sentences_are_the_same_ones_for_a_seed_and_of_all_lengths() -> None:
    from benchmarks.sentences import texts

    found = texts(300, 7)
    assert found == texts(300, 7) != texts(300, 8)
    lengths = sorted(len(it["text"]) for it in found)
    assert 12 <= lengths[0] < 60
    assert 700 < lengths[-1] <= 1_000
    assert 120 < lengths[150] < 200
    assert {frozenset(it) for it in texts(20, 1, kind="passage")} == {frozenset({"id", "title", "text"})}
    assert all(it["text"].endswith("?") for it in texts(20, 1, kind="query"))
