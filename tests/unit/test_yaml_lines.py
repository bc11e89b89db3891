from __future__ import annotations

from pathlib import Path

import pytest

from streamproc.errors import SettingsError
from streamproc.yaml_lines import load_yaml


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "it.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_are_found_in_the_line_of_their_key(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\n\ntasks:\n  text:\n    topics:\n      - a\n      - b\n    size: 3\n")
    data, place_of = load_yaml(path)
    assert data == {"name": "x", "tasks": {"text": {"topics": ["a", "b"], "size": 3}}}
    assert place_of(("name",)) == f"{path}:1"
    assert place_of(("tasks", "text", "topics")) == f"{path}:5"
    assert place_of(("tasks", "text", "topics", 1)) == f"{path}:7"
    assert place_of(("tasks", "text", "size")) == f"{path}:8"


def test_what_is_missing_is_placed_where_it_should_be(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\ntasks:\n  text:\n    size: 3\n")
    _, place_of = load_yaml(path)
    assert place_of(("tasks", "text", "input", "topics")) == f"{path}:3"
    assert place_of(("kafka",)) == f"{path}:1"


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "# only a comment\n")
    data, place_of = load_yaml(path)
    assert data is None
    assert place_of(("name",)) == str(path)


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n")
    with pytest.raises(SettingsError, match=r"it\.yaml:5: 'c' is given twice, first in line 3"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3),
        ("a: 1\n\tb: 2\n", 2),
        ("a: 'x\n", 2),
        ("a: 1\n---\nb: 2\n", 2),
        ("a: !!python/object:os.system {}\n", 1),
        ("a: 1\nb: \x07\n", 2),
        ("a: *nowhere\n", 1),
        ("[1, 2]: x\n", 1),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_yaml(path)
    assert caught.value.place == f"{path}:{line}"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no\.yaml: the file cannot be read: No such file"):
        load_yaml(tmp_path / "no.yaml")


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "it.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(SettingsError, match="not UTF-8"):
        load_yaml(path)


def test_merged_keys_stand_where_they_were_written(tmp_path: Path) -> None:
    path = write(tmp_path, "base: &base\n  a: 1\n  b: 2\nit:\n  <<: *base\n  b: 3\n")
    data, place_of = load_yaml(path)
    assert data["it"] == {"a": 1, "b": 3}
    assert place_of(("it", "a")) == f"{path}:2"
    assert place_of(("it", "b")) == f"{path}:6"


def test_a_part_that_contains_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="contains itself"):
        load_yaml(write(tmp_path, "a: &a\n  - *a\n"))


def test_aliases_cannot_blow_a_file_up(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(SettingsError, match="more than 100000 parts"):
        load_yaml(write(tmp_path, "\n".join(lines)))


BOMBS = {
    "lists": "[" * 100_000,
    "mappings": "{a: " * 100_000,
    "blocks": "- " * 50_000 + "a",
    "explicit keys": "? " * 50_000,
    "merges of the same": "a0: &a0 {k: {x: 1}}\n"
    + "".join(f"a{i}: &a{i} {{k: {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}}}\n" for i in range(1, 10)),
    "merges of merges": "a0: &a0 {k: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10)),
    "a merge of itself": "a: &a {<<: *a}",
    "a number in base 60": "a: " + "1:" * 300_000 + "1",
    "a number in base 16": "a: 0x" + "f" * 500_000,
    "a large file": "a: b\n# " + "x" * 1_048_576,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
@pytest.mark.timeout(20)
def test_what_would_take_for_ever_or_end_the_process_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError):
        load_yaml(write(tmp_path, text))


def test_what_merges_lists_is_placed_and_merged_from_the_inside(tmp_path: Path) -> None:
    path = write(tmp_path, "a: &a\n  x: 1\nb: &b\n  <<: *a\n  y: 2\nc:\n  <<: [*b]\n  z: 3\n")
    data, place_of = load_yaml(path)
    assert data["c"] == {"x": 1, "y": 2, "z": 3}
    assert place_of(("c", "x")) == f"{path}:2"
    assert place_of(("c", "z")) == f"{path}:8"


@pytest.mark.parametrize(
    "value",
    [
        *("2001-99-99", "0b_", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary YQ==", "!!set {a}"),
        *("!!omap [a: 1]", "!!pairs [a: 1]", "!mine x", "=", "0x" + "f" * 200, "9" * 5_000, "{!!binary YQ==: 1}"),
    ],
)
def test_what_is_no_plain_value_is_refused_with_its_line_and_not_repeated(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f"a: 1\nb: {value}\n")
    with pytest.raises(SettingsError) as caught:
        load_yaml(path)
    assert caught.value.place == f"{path}:2"
    assert "put it in quotes" in caught.value.hint
    for part in (value, "mine", "invalid literal"):
        assert part == "=" or part not in caught.value.problem
