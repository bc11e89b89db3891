"""Settings from a file and the environment, and the sentence for each way in which they can be wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from streamproc.errors import SettingsError
from streamproc.settings import Settings
from streamproc.settings_loading import json_schema, load_kafka_settings, load_settings, load_with_places

MINIMAL = """\
name: app
backend: {path: "inference:Backend"}
tasks:
  text:
    input: {topics: [in]}
    batch:
      max_size: 16
  image-large:
    input: {topics: [images]}
"""

Load = Callable[..., Settings]
Refused = Callable[..., SettingsError]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str = MINIMAL, environ: Mapping[str, str] | None = None) -> Settings:
        path = tmp_path / "streamproc.yaml"
        path.write_text(text)
        return load_settings(path, environ or {})

    return load


@pytest.fixture
def refused(load: Load) -> Refused:
    def refused(text: str = MINIMAL, environ: Mapping[str, str] | None = None) -> SettingsError:
        with pytest.raises(SettingsError) as caught:
            load(text, environ)
        message = str(caught.value)
        assert "\n" not in message
        assert caught.value.exit_code == 2
        return caught.value

    return refused


def test_a_minimal_file_is_enough(load: Load) -> None:
    settings = load()
    assert settings.name == "app"
    assert list(settings.tasks) == ["text", "image-large"]
    assert settings.kafka.bootstrap_servers == "localhost:9092"


def test_the_default_file_is_streamproc_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "streamproc.yaml").write_text(MINIMAL)
    assert load_settings(None, {}).name == "app"


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"there is no settings file .*nowhere\.yaml; create it, or .*--config"):
        load_settings(tmp_path / "nowhere.yaml", {})


def test_a_folder_is_no_settings_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is a folder"):
        load_settings(tmp_path, {})


def test_an_empty_file_is_said_to_be_empty(refused: Refused) -> None:
    assert refused("# nothing\n").problem == "is empty"


def test_a_file_that_is_a_list_is_refused(refused: Refused) -> None:
    assert "expected keys and values at the top, got a list" in str(refused("- a\n- b\n"))


# --- paths -----------------------------------------------------------------------------------------------------------


def test_relative_paths_start_from_the_settings_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    settings = load(
        MINIMAL + "kafka: {security_protocol: SASL_PLAINTEXT, sasl_username: me, sasl_password_file: secret}\n"
    )
    assert settings.kafka.sasl_password_file == tmp_path / "secret"
    assert settings.backend.base_dir == tmp_path
    assert settings.topics_dir == tmp_path / "topics"


def test_a_file_of_the_registry_must_be_there_and_is_relative_to_the_settings(
    load: Load, refused: Refused, tmp_path: Path
) -> None:
    registry = "schema_registry: {url: 'https://registry', token_file: token}\n"
    assert refused(MINIMAL + registry).setting == "schema_registry.token_file"
    (tmp_path / "token").write_text("x")
    assert load(MINIMAL + registry).schema_registry.token_file == tmp_path / "token"


def test_absolute_paths_stay(load: Load, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    assert load(MINIMAL, {"STREAMPROC_BACKEND__BASE_DIR": str(elsewhere)}).backend.base_dir == elsewhere


def test_a_file_that_the_settings_name_must_be_there(refused: Refused) -> None:
    error = refused(MINIMAL + "kafka:\n  security_protocol: SSL\n  ssl_ca_file: ca.pem\n")
    assert error.setting == "kafka.ssl_ca_file"
    assert error.place.endswith("streamproc.yaml:12")
    assert "there is no file" in error.problem


def test_a_topics_folder_that_is_named_must_be_there(refused: Refused) -> None:
    assert refused(MINIMAL + "topics_dir: declared\n").setting == "topics_dir"


@pytest.mark.parametrize("address", ["localhost", "a:1,b", "a:1,,b:2", "a:0", "a:70000", ":9092", "kafka:nine", ""])
def test_what_is_no_address_with_a_port_is_refused(refused: Refused, address: str) -> None:
    error = refused(MINIMAL, {"STREAMPROC_KAFKA__BOOTSTRAP_SERVERS": address})
    assert error.setting == "kafka.bootstrap_servers"
    assert "host:port" in error.problem
    with pytest.raises(SettingsError, match="host:port"):
        load_kafka_settings({"STREAMPROC_KAFKA__BOOTSTRAP_SERVERS": address})


@pytest.mark.parametrize("address", ["localhost:9092", "a.b:1, [::1]:65535", "kafka_1:9092"])
def test_addresses_with_ports_are_taken(load: Load, address: str) -> None:
    assert load(MINIMAL, {"STREAMPROC_KAFKA__BOOTSTRAP_SERVERS": address}).kafka.bootstrap_servers == address


# --- the environment -------------------------------------------------------------------------------------------------


def test_the_environment_is_over_the_file(load: Load) -> None:
    settings = load(
        MINIMAL,
        {
            "STREAMPROC_KAFKA__BOOTSTRAP_SERVERS": "kafka:9092",
            "STREAMPROC_TASKS__TEXT__BATCH__MAX_SIZE": "8",
            "STREAMPROC_NAME": "other",
            "streamproc_pool__workers": "3",
        },
    )
    assert settings.kafka.bootstrap_servers == "kafka:9092"
    assert settings.tasks["text"].batch.max_size == 8
    assert settings.name == "other"
    assert settings.pool.workers == 3


def test_hyphens_and_dots_in_a_tasks_name_are_underscores_in_a_variables(load: Load) -> None:
    assert (
        load(MINIMAL, {"STREAMPROC_TASKS__IMAGE_LARGE__BATCH__MAX_SIZE": "4"}).tasks["image-large"].batch.max_size == 4
    )


def test_lists_and_sections_are_json(load: Load) -> None:
    settings = load(
        MINIMAL,
        {
            "STREAMPROC_TASKS__TEXT__INPUT__TOPICS": '["a", "b"]',
            "STREAMPROC_POOL__RECYCLE": '{"max_batches": 7}',
            "STREAMPROC_POOL__DEVICES": '["0"]',
        },
    )
    assert settings.tasks["text"].input.topics == ["a", "b"]
    assert settings.pool.recycle.max_batches == 7
    assert settings.pool.devices == ["0"]


@pytest.mark.parametrize("written", ["[0, 1]", '["0", "1"]', '[0, "1"]'])
def test_a_device_may_be_a_number(load: Load, written: str) -> None:
    assert load(MINIMAL, {"STREAMPROC_POOL__DEVICES": written}).pool.devices == ["0", "1"]


def test_a_section_as_json_is_merged_and_narrower_variables_win(load: Load) -> None:
    settings = load(
        MINIMAL,
        {
            "STREAMPROC_TASKS__TEXT__BATCH__MAX_WAIT_MS": "7",
            "STREAMPROC_TASKS__TEXT__BATCH": '{"max_wait_ms": 5, "max_bytes": 1000}',
        },
    )
    batch = settings.tasks["text"].batch
    assert (batch.max_size, batch.max_wait_ms, batch.max_bytes) == (16, 7, 1000)


def test_all_the_tasks_may_come_from_one_variable(load: Load) -> None:
    text = 'name: app\nbackend: {path: "m:B"}\n'
    environ = {
        "STREAMPROC_TASKS": '{"one": {"input": {"topics": ["in"]}}}',
        "STREAMPROC_TASKS__ONE__BATCH__MAX_SIZE": "3",
    }
    assert load(text, environ).tasks["one"].batch.max_size == 3


def test_keys_of_free_sections_keep_their_meaning(load: Load) -> None:
    settings = load(
        MINIMAL.replace('"inference:Backend"', '"inference:Backend", config: {featureNames: [a]}'),
        {
            "STREAMPROC_POOL__ENV__OMP_NUM_THREADS": "2",
            "STREAMPROC_BACKEND__CONFIG__FEATURENAMES": '["b"]',
            "STREAMPROC_BACKEND__CONFIG__MODEL": "large",
            "STREAMPROC_BACKEND__CONFIG__OPTIONS__DEPTH": "3",
        },
    )
    assert settings.pool.env == {"OMP_NUM_THREADS": "2"}
    assert settings.backend.config == {"featureNames": ["b"], "model": "large", "options": {"depth": 3}}


LENGTH = "STREAMPROC_TASKS__TEXT__BATCH__LENGTH"


@pytest.mark.parametrize(
    ("written", "environ", "expected"),
    [
        ("bytes", {}, ("bytes", None, "characters")),
        ("backend", {}, ("backend", None, "characters")),
        ("{of: bytes}", {}, ("bytes", None, "characters")),
        ("{field: text}", {}, ("field", "text", "characters")),
        ("{field: a.b, unit: items}", {}, ("field", "a.b", "items")),
        ("null", {LENGTH: "backend"}, ("backend", None, "characters")),
        ("null", {LENGTH: '{"field": "text"}'}, ("field", "text", "characters")),
        ("bytes", {f"{LENGTH}__FIELD": "text", f"{LENGTH}__UNIT": "value"}, ("field", "text", "value")),
        ("{field: text}", {LENGTH: "bytes"}, ("bytes", None, "characters")),
    ],
)
def test_a_length_is_a_word_or_a_section(
    load: Load, written: str, environ: dict[str, str], expected: tuple[str, str | None, str]
) -> None:
    batch = load(MINIMAL.replace("max_size: 16", f"length: {written}"), environ).tasks["text"].batch
    assert batch.length is not None
    assert (batch.length.of, batch.length.field, batch.length.unit) == expected
    assert batch.strategy == "bucketed"


@pytest.mark.parametrize(
    ("written", "problem", "hint"),
    [
        ("byte", "expected bytes, field or backend, got 'byte'", "did you mean bytes?"),
        ("{unit: items}", "is missing", "add it"),
        ("{of: field}", "a field is to be measured, and none is named", "set field"),
        ("{of: backend, field: text}", "is set, and of: backend measures no field", "keep one of them"),
        (
            "{field: text, unit: words}",
            "expected characters, bytes, items or value, got 'words'",
            "choose one of these",
        ),
        ("{field: text, units: items}", "is no setting", "did you mean unit?"),
        ("7", "expected a section of keys and values, got a number", "change it"),
    ],
)
def test_a_length_that_is_none_is_refused(refused: Refused, written: str, problem: str, hint: str) -> None:
    error = refused(MINIMAL.replace("max_size: 16", f"length: {written}"))
    assert str(error.setting).startswith("tasks.text.batch.length")
    assert error.place.endswith("streamproc.yaml:7")
    assert problem in error.problem
    assert hint in error.hint


def test_null_takes_an_optional_setting_back(load: Load) -> None:
    text = MINIMAL + "pool: {recycle: {max_batches: 5}}\n"
    assert load(text, {"STREAMPROC_POOL__RECYCLE__MAX_BATCHES": "null"}).pool.recycle.max_batches is None


@pytest.mark.parametrize(
    ("environ", "text_size", "image_size"),
    [
        ({}, 16, 64),
        ({"INFERENCE_MAX_BATCH_SIZE": "5"}, 5, 5),
        ({"INFERENCE_MAX_BATCH_SIZE": "5", "INFERENCE_MAX_BATCH_SIZE_TEXT": "6"}, 6, 5),
        ({"INFERENCE_MAX_BATCH_SIZE_IMAGE_LARGE": "9"}, 16, 9),
        (
            {
                "INFERENCE_MAX_BATCH_SIZE": "5",
                "INFERENCE_MAX_BATCH_SIZE_TEXT": "6",
                "STREAMPROC_TASKS__TEXT__BATCH__MAX_SIZE": "7",
            },
            7,
            5,
        ),
        ({"INFERENCE_MAX_BATCH_SIZE": "5", "STREAMPROC_TASKS": '{"text": {"batch": {"max_size": 8}}}'}, 8, 5),
    ],
)
def test_the_seeds_variables_lie_between_file_and_our_own(
    load: Load, environ: dict[str, str], text_size: int, image_size: int
) -> None:
    settings = load(MINIMAL, environ)
    assert settings.tasks["text"].batch.max_size == text_size
    assert settings.tasks["image-large"].batch.max_size == image_size


@pytest.mark.parametrize(
    ("environ", "text_size", "image_size"),
    [
        ({}, 16, 48),
        ({"STREAMPROC_BATCH__MAX_SIZE": "32"}, 16, 32),
        ({"STREAMPROC_BATCH__MAX_SIZE": "32", "INFERENCE_MAX_BATCH_SIZE_IMAGE_LARGE": "5"}, 16, 5),
        ({"INFERENCE_MAX_BATCH_SIZE": "5"}, 5, 5),
    ],
)
def test_the_applications_limits_are_for_tasks_that_set_none(
    load: Load, environ: dict[str, str], text_size: int, image_size: int
) -> None:
    settings = load(MINIMAL + "batch: {max_size: 48, max_padded: 900, oversized: dead_letter}\n", environ)
    text, image = settings.tasks["text"].batch, settings.tasks["image-large"].batch
    assert (text.max_size, image.max_size) == (text_size, image_size)
    assert (text.oversized, image.oversized) == ("dead_letter", "dead_letter")
    assert image.max_padded is None, "it has no length to pad to"


def test_a_tasks_limit_has_the_place_of_the_applications(tmp_path: Path) -> None:
    path = tmp_path / "streamproc.yaml"
    path.write_text("batch: {max_size: 48}\n" + MINIMAL)
    place_of = load_with_places(path, {}).place_of
    assert place_of(("tasks", "image-large", "batch", "max_size")) == f"{path}:1"
    assert place_of(("tasks", "image-large", "batch", "max_bytes")) == "default"


def test_what_is_wrong_with_the_applications_limits_is_said_of_them(refused: Refused) -> None:
    error = refused(MINIMAL + "batch: {max_size: many}\n", {})
    assert "batch.max_size: expected a whole number" in str(error)
    assert "tasks." not in str(error)


def test_a_seed_variable_for_no_task_is_warned_of(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(MINIMAL, {"INFERENCE_MAX_BATCH_SIZE_TXT": "5"})
    assert "INFERENCE_MAX_BATCH_SIZE_TXT names none of the tasks" in caplog.text


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("STREAMPROC_KAFKA__BOOTSTRAP_SERVER", "did you mean STREAMPROC_KAFKA__BOOTSTRAP_SERVERS?"),
        ("STREAMPROC_KAFKA_BOOTSTRAP_SERVERS", "did you mean STREAMPROC_KAFKA__BOOTSTRAP_SERVERS?"),
        ("STREAMPROC_KAKFA__BOOTSTRAP_SERVERS", "did you mean STREAMPROC_KAFKA__BOOTSTRAP_SERVERS?"),
        ("STREAMPROC_TASKS__TEXT__BATCH__MAXSIZE", "did you mean STREAMPROC_TASKS__TEXT__BATCH__MAX_SIZE?"),
        ("STREAMPROC_TASKS__TEXT__MAX_SIZE", "did you mean STREAMPROC_TASKS__TEXT__BATCH__MAX_SIZE?"),
        ("STREAMPROC_TASKS__TXT__BATCH__MAX_SIZE", "did you mean STREAMPROC_TASKS__TEXT?"),
        ("STREAMPROC_TASKS__TEXT__ON_ERROR__CAUSES__CRSH__THEN", "STREAMPROC_TASKS__TEXT__ON_ERROR__CAUSES__CRASH?"),
        ("STREAMPROC_TOPICSDIR", "did you mean STREAMPROC_TOPICS_DIR?"),
        ("STREAMPROC_HTTP__PORT__NUMBER", "set STREAMPROC_HTTP__PORT"),
        ("STREAMPROC_QUITE__ELSE", "the sections are name, kafka"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_refused_with_the_nearest(
    refused: Refused, variable: str, nearest: str
) -> None:
    error = refused(MINIMAL, {variable: "1"})
    assert error.place == f"environment variable {variable}"
    assert nearest in error.hint


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("STREAMPROC_REQUIRE_KAFKA", "1"),
        ("STREAMPROC_REQUIRE_SENTENCES", "1"),
        ("STREAMPROC_TEST_KAFKA", "kafka:9092"),
        ("STREAMPROC_DEBUG", "1"),
        ("STREAMPROC_WORKER", "0"),
        ("STREAMPROC_PORT", "tcp://10.0.0.1:8080"),
        ("STREAMPROC_SERVICE_HOST", "10.0.0.1"),
        ("STREAMPROC_HTTP_PORT", "tcp://10.0.0.1:8080"),
        ("STREAMPROC_HTTP_PORT_8080_TCP_ADDR", "10.0.0.1"),
    ],
)
def test_variables_that_are_meant_for_others_pass_silently(
    load: Load, variable: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    load(MINIMAL, {variable: value})
    assert not caplog.records


def test_a_variable_of_the_compose_file_is_only_warned_of(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    load(MINIMAL, {"STREAMPROC_KAFKA_IMAGE": "apache/kafka:4.1.1"})
    assert "STREAMPROC_KAFKA_IMAGE is no setting" in caplog.text


def test_tasks_that_are_alike_in_the_environment_cannot_be_meant_by_it(refused: Refused) -> None:
    text = MINIMAL + "  image.large: {input: {topics: [more]}}\n"
    error = refused(text, {"STREAMPROC_TASKS__IMAGE_LARGE__BATCH__MAX_SIZE": "2"})
    assert "could mean the tasks image-large and image.large" in error.problem


def test_json_that_is_none_is_refused_without_repeating_it(refused: Refused) -> None:
    error = refused(MINIMAL, {"STREAMPROC_TASKS__TEXT__INPUT__TOPICS": "in,out"})
    assert str(error) == (
        "environment variable STREAMPROC_TASKS__TEXT__INPUT__TOPICS: tasks.text.input.topics: expected JSON, which "
        'this is not; write it as ["a", "b"]'
    )


def test_a_wrong_value_from_the_environment_names_the_variable(refused: Refused) -> None:
    error = refused(MINIMAL, {"INFERENCE_MAX_BATCH_SIZE_TEXT": "many"})
    assert str(error) == (
        "environment variable INFERENCE_MAX_BATCH_SIZE_TEXT: tasks.text.batch.max_size: expected a whole number, got "
        "'many'; change it"
    )


# --- what was wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "sentence"),
    [
        (MINIMAL + "kafak: {}\n", 10, "kafak: is no setting; did you mean kafka?"),
        (
            MINIMAL + "    on_error: {causes: {crashed: {then: drop}}}\n",
            10,
            "tasks.image-large.on_error.causes.crashed: is no setting; did you mean crash?",
        ),
        (
            MINIMAL.replace("max_size: 16", "max_sise: 16"),
            7,
            "tasks.text.batch.max_sise: is no setting; did you mean max_size?",
        ),
        (
            MINIMAL.replace("    batch:\n      max_size: 16", "    max_size: 16"),
            6,
            "tasks.text.max_size: is no setting; did you mean tasks.text.batch.max_size?",
        ),
        (
            MINIMAL + "http: {xyz: 1}\n",
            10,
            "http.xyz: is no setting; known here: enabled, host, port",
        ),
        (MINIMAL.replace("name: app\n", ""), 1, "name: is missing; add it"),
        (MINIMAL.replace("input: {topics: [in]}", "input: {}"), 5, "tasks.text.input.topics: is missing; add it"),
        (
            MINIMAL.replace("16", "lots"),
            7,
            "tasks.text.batch.max_size: expected a whole number, got 'lots'; change it",
        ),
        (MINIMAL.replace("16", "0"), 7, "tasks.text.batch.max_size: expected at least 1, got 0; change it"),
        (MINIMAL.replace("16", "1.5"), 7, "tasks.text.batch.max_size: expected a whole number, got 1.5; change it"),
        (
            MINIMAL.replace("[in]", "in"),
            5,
            "tasks.text.input.topics: expected a list, got 'in'; put it in brackets: [a, b]",
        ),
        (MINIMAL.replace("[in]", "[]"), 5, "tasks.text.input.topics: is empty; give at least 1"),
        (MINIMAL.replace("name: app", "name: 5"), 1, "name: expected text, got 5; put it in quotes"),
        (
            MINIMAL.replace("name: app", "name: my app"),
            1,
            "name: 'my app' is no name; use letters, digits, dots, underscores and hyphens",
        ),
        (
            MINIMAL + "pool:\n",
            10,
            "pool: expected a section of keys and values, got nothing; fill it, or leave the key out",
        ),
        (
            MINIMAL.replace("input: {topics: [images]}", "input: {topics: [images]}\n    ordering: keys"),
            10,
            "tasks.image-large.ordering: expected partition, key or unordered, got 'keys'; did you mean key?",
        ),
        (MINIMAL + "http: {enabled: perhaps}\n", 10, "http.enabled: expected true or false, got 'perhaps'; change it"),
        (
            MINIMAL + "logging: {level: loud}\n",
            10,
            "logging.level: expected debug, info, warning or error, got 'loud'; choose one of these",
        ),
        (MINIMAL.replace("  text:", "  a b:"), 4, "tasks.a b: 'a b' is no name"),
    ],
)
def test_each_mistake_has_its_line_and_its_sentence(refused: Refused, text: str, line: int, sentence: str) -> None:
    message = str(refused(text))
    place, _, rest = message.partition(": ")
    assert place.endswith(f"streamproc.yaml:{line}")
    assert rest.startswith(sentence)


def test_several_mistakes_are_named_with_their_places(refused: Refused) -> None:
    error = refused(MINIMAL.replace("16", "lots") + "htp: {}\npool: {workers: 0}\n")
    message = str(error)
    for setting in ("tasks.text.batch.max_size", "htp", "pool.workers"):
        assert setting in message
    assert message.count("streamproc.yaml:") == 3


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "kafka: {sasl_password: [hunter2]}\n",
        MINIMAL + "kafka: {sasl_pasword: hunter2}\n",
        MINIMAL + "pool: {env: {TOKEN: [hunter2]}}\n",
        MINIMAL + "pool: {env: {TOKEN: {hunter: hunter2}}}\n",
    ],
)
def test_no_message_repeats_a_secret(refused: Refused, text: str) -> None:
    assert "hunter2" not in str(refused(text))


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + "kafka: {sasl_password:hunter2}\n",
        MINIMAL + "kafka: {sasl_password = hunter2}\n",
        MINIMAL + "kafka:\n  sasl_password:hunter2\n",
        MINIMAL + "kafka:\n  sasl_password=hunter2\n",
        MINIMAL + "kafka: hunter2\n",
        MINIMAL + "kafka:\n  security_protocol: SASL_SSL\n  sasl_password=hunter2\n",
        MINIMAL + "kafka: {sasl_password hunter2}\n",
        MINIMAL + "kafka: {sasl_password: !hunter2 x}\n",
        MINIMAL + "kafka: {sasl_password: *hunter2}\n",
        MINIMAL + "kafka: {sasl_password: !!int hunter2}\n",
        MINIMAL + "pool:\n  env:\n    API_TOKEN=hunter2\n",
    ],
)
def test_no_message_repeats_a_secret_that_lacks_its_space_or_its_quotes(refused: Refused, text: str) -> None:
    error = refused(text)
    assert "hunter2" not in f"{error} {error!r} {error.problem} {error.setting} {error.hint}"


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL + '"a\\nb": 1\n',
        MINIMAL + '"a\\x1b[31mb": 1\n',
        MINIMAL + '"\\u2028": 1\n',
        MINIMAL + f"http: {{host: [], ? {'x' * 100_000} : 1}}\n",
        MINIMAL.replace("[in]", '["a\\nb"]'),
        MINIMAL + "topics_dir: " + "x" * 100_000 + "\n",
        MINIMAL + 'kafka: {security_protocol: SSL, ssl_ca_file: "a\\0b"}\n',
        MINIMAL + f"kafka: {{security_protocol: SSL, ssl_ca_file: {'x' * 5_000}}}\n",
        MINIMAL + "kafka: {bootstrap_servers: " + "x" * 100_000 + "}\n",
        MINIMAL + "pool: {workers: 0x" + "f" * 5_000 + "}\n",
        MINIMAL + "kafka: {session_timeout_ms: 2147483648, max_poll_interval_ms: 2147483648}\n",
    ],
)
def test_a_message_is_one_line_that_can_be_printed_and_read(refused: Refused, text: str) -> None:
    message = str(refused(text))
    assert message.isprintable()
    assert len(message) < 4_000


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("STREAMPROC_POOL", "[" * 100_000),
        ("STREAMPROC_POOL", '{"env":' * 70 + "1" + "}" * 70),
        ("STREAMPROC_POOL__ENV", '{"a": "\\ud800"}'),
        ("STREAMPROC_NAME", "\udcff"),
        ("STREAMPROC_KAFKA__SASL_PASSWORD", "\udcff"),
        ("STREAMPROC_BACKEND__CONFIG" + "__A" * 300, "1"),
        ("STREAMPROC_BACKEND__CONFIG__\udcff", "1"),
        ("STREAMPROC_POOL__ENV__\udcff", "1"),
    ],
)
def test_a_variable_that_cannot_be_taken_is_refused_in_one_line(refused: Refused, variable: str, value: str) -> None:
    assert str(refused(MINIMAL, {variable: value})).isprintable()


def test_json_for_a_free_section_that_is_nested_without_end_stays_text(load: Load) -> None:
    settings = load(MINIMAL, {"STREAMPROC_BACKEND__CONFIG__TEXT": "[" * 5_000})
    assert settings.backend.config == {"text": "[" * 5_000}


def test_a_settings_path_that_is_too_long_is_no_file() -> None:
    with pytest.raises(SettingsError, match="there is no settings file"):
        load_settings(Path("x" * 5_000), {})


def test_a_number_where_a_secret_should_be_is_not_repeated(refused: Refused) -> None:
    assert "271828" not in str(refused(MINIMAL + "kafka: {sasl_password: 271828}\n"))
    assert "271828" not in str(refused(MINIMAL + "pool: {env: {TOKEN: 271828}}\n"))


def test_settings_that_do_not_go_together_have_the_line_of_the_one_to_change(refused: Refused) -> None:
    error = refused(MINIMAL.replace("max_size: 16", "max_wait_ms: 400000"))
    assert error.setting == "tasks.text.batch.max_wait_ms"
    assert error.place.endswith("streamproc.yaml:7")
    assert "max_poll_interval_ms" in error.problem


def test_where_the_first_of_two_settings_is_a_default_the_place_is_the_others(refused: Refused) -> None:
    error = refused(MINIMAL + "kafka:\n  max_poll_interval_ms: 5000\n")
    assert error.setting == "rebalance_drain_s"
    assert error.place.endswith("streamproc.yaml:11")


def test_where_two_settings_clash_in_the_environment_the_place_is_the_variable(refused: Refused) -> None:
    error = refused(MINIMAL, {"STREAMPROC_KAFKA__SECURITY_PROTOCOL": "SASL_SSL"})
    assert error.place == "environment variable STREAMPROC_KAFKA__SECURITY_PROTOCOL"
    assert error.setting == "kafka.security_protocol"


# --- places, Kafka alone, schema -------------------------------------------------------------------------------------


def test_every_setting_knows_its_place(tmp_path: Path) -> None:
    path = tmp_path / "streamproc.yaml"
    path.write_text(MINIMAL)
    loaded = load_with_places(path, {"STREAMPROC_POOL__WORKERS": "2"})
    assert loaded.place_of(("tasks", "text", "batch", "max_size")) == f"{path}:7"
    assert loaded.place_of(("pool", "workers")) == "environment variable STREAMPROC_POOL__WORKERS"
    assert loaded.place_of(("pool", "start_attempts")) == "default"


def test_kafka_alone_may_come_from_the_environment() -> None:
    environ = {"STREAMPROC_KAFKA__BOOTSTRAP_SERVERS": "kafka:9092", "STREAMPROC_TASKS__TEXT__BATCH__MAX_SIZE": "1"}
    assert load_kafka_settings(environ).bootstrap_servers == "kafka:9092"
    with pytest.raises(SettingsError, match=r"KAFKA__SESSION_TIMEOUT_MS: kafka.session_timeout_ms: expected a whole"):
        load_kafka_settings({"STREAMPROC_KAFKA__SESSION_TIMEOUT_MS": "long"})


def _accepts(schema: dict[str, Any], text: str) -> bool:
    return jsonschema_rs.validator_for(schema).is_valid(yaml.safe_load(text))


def test_the_json_schema_accepts_what_we_accept_and_says_what_each_setting_is() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["title"] == "streamproc.yaml"
    assert _accepts(schema, MINIMAL)
    assert not _accepts(schema, MINIMAL + "htp: {}\n")
    assert not _accepts(schema, MINIMAL.replace("16", "0"))
    undescribed = [
        f"{model}.{name}"
        for model, section in {"Settings": schema, **schema["$defs"]}.items()
        for name, field in section.get("properties", {}).items()
        if "description" not in field and "$ref" not in field and name != "tasks"  # sections describe themselves
    ]
    assert undescribed == []
