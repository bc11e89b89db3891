"""Masking: what a rule names is gone, what none names stays, and what was equal stays equal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamproc.record_lines import PlacedRecord
from streamproc.replay.mask import ACTIONS, REDACTED, Masker, MaskError, Unreadable, parse_rule

SALT = b"salt"


def _record(value: bytes | None, key: bytes | None = None, headers: Sequence[Any] = ()) -> PlacedRecord:
    return PlacedRecord("people", 1, 41, 1_700_000_000_000, key, value, list(headers))


def _masker(*rules: str, salt: bytes = SALT, unreadable: Unreadable = "stop") -> Masker:
    return Masker([parse_rule(rule) for rule in rules], salt, unreadable)


def _masked(document: Any, *rules: str) -> Any:
    masked = _masker(*rules)(_record(json.dumps(document).encode())).value
    assert masked is not None
    return json.loads(masked)


def test_each_action_does_what_it_is_for() -> None:
    person = {"name": "Anna Meyer", "age": 41, "ratio": -0.25, "adult": True, "note": None, "id": 7}
    assert _masked(person, "value.name=drop", "value.note=drop") == {
        name: value for name, value in person.items() if name not in ("name", "note")
    }
    rules = [f"value.{name}" for name in person if name != "id"]
    assert _masked(person, *[f"{rule}=redact" for rule in rules]) == {
        "name": REDACTED,
        "age": 0,
        "ratio": 0,
        "adult": False,
        "note": None,
        "id": 7,
    }
    hashed = _masked(person, *[f"{rule}=hash" for rule in rules])
    assert len(hashed["name"]) == 16
    assert isinstance(hashed["age"], int)
    assert (hashed["adult"], hashed["note"], hashed["id"]) == (False, None, 7)
    faked = _masked(person, *[f"{rule}=fake" for rule in rules])
    first, last = faked["name"].split(" ")
    assert (len(first), len(last), first.istitle(), last.istitle()) == (4, 5, True, True)
    assert 10 <= faked["age"] <= 89
    assert -9 < faked["ratio"] < -1


def test_a_fake_keeps_the_look_of_a_text() -> None:
    faked = _masked({"at": "2026-01-31T12:00:59Z", "mail": "a.b@c.org"}, "value.at=fake", "value.mail=fake")
    assert [it for it in faked["at"] if not it.isalnum()] == ["-", "-", ":", ":"]
    assert [it for it in faked["mail"] if not it.isalnum()] == [".", "@", "."]


def test_lists_are_entered_and_names_may_have_dots() -> None:
    document = {"items": [{"owner": "a", "n": 1}, {"n": 2}, [{"owner": "b"}], 3], "a.b": {"c": "x"}, "a": {"b.c": "y"}}
    assert _masked(document, "value.items.owner=redact", "value.a.b.c=redact") == {
        "items": [{"owner": "***", "n": 1}, {"n": 2}, [{"owner": "***"}], 3],
        "a.b": {"c": "***"},
        "a": {"b.c": "***"},
    }


def test_everything_below_a_field_is_masked() -> None:
    assert _masked({"user": {"names": ["a", {"b": 5}], "ok": True}}, "value.user=redact") == {
        "user": {"names": ["***", {"b": 0}], "ok": False}
    }


def test_keys_headers_and_whole_values() -> None:
    masker = _masker("key=hash", "headers.user.id=redact", "headers.gone=drop", "value=drop")
    masked = masker(_record(b"{}", b"k", [("user.id", b"a"), ("x", b"y"), ("gone", b"z"), ("user.id", None)]))
    assert masked.value is None
    assert masked.key != b"k"
    assert masked.headers == [("user.id", b"***"), ("x", b"y"), ("user.id", None)]
    assert (masked.topic, masked.partition, masked.offset, masked.timestamp) == ("people", 1, 41, 1_700_000_000_000)
    assert list(masker.matched.values()) == [1, 2, 1, 1]


def test_a_field_within_a_key_is_masked() -> None:
    assert _masker("key.user=redact")(_record(None, b'{"user": "a", "n": 1.50}')).key == b'{"user":"***","n":1.50}'


def test_what_was_equal_is_equal_in_all_places_and_topics() -> None:
    masker = _masker("key=hash", "value.user=hash", "value.number=hash", "headers.user=hash")
    one = masker(_record(b'{"user": "u7", "number": 7}', b"u7", [("user", b"u7")]))
    other = masker(_record(b'{"user": "7", "number": 8}', b"7"))
    first, second = json.loads(one.value or b""), json.loads(other.value or b"")
    assert one.key == one.headers[0][1] == first["user"].encode()
    assert other.key == second["user"].encode() == str(first["number"]).encode()
    assert first["number"] != second["number"]
    again = _masker("key=hash")(_record(None, b"u7"))
    assert again.key == one.key
    assert _masker("key=hash", salt=b"other")(_record(None, b"u7")).key != one.key


def test_numbers_that_no_rule_names_keep_their_digits() -> None:
    value = b'{"a":"x","big":123456789012345678901234567890,"exact":1.10000000000000000000001,"e":1E5}'
    assert _masker("value.a=redact")(_record(value)).value == value.replace(b'"x"', b'"***"')


def test_a_record_that_no_rule_matches_stays_byte_for_byte() -> None:
    value = b'{ "a" : 1.0,\n "a":2 }'
    masker = _masker("value.b=drop", "key.x=drop", "headers.h=drop")
    record = _record(value, b"{}", [("k", b"v")])
    assert masker(record) == record
    assert list(masker.matched.values()) == [0, 0, 0]
    assert masker(_record(None)).value is None


@pytest.mark.parametrize("value", [b"plain", b"\xff\xfe{\x00}\x00", b"[NaN]", b'{"b":"\\ud800","a":1}', b"[" * 100_000])
def test_a_value_that_is_no_json_stops_the_capture_unless_told(value: bytes) -> None:
    with pytest.raises(MaskError, match=r"the value of topic people, partition 1, offset 41 is no JSON") as caught:
        _masker("value.a=redact")(_record(value))
    assert "plain" not in str(caught.value)
    assert _masker("value.a=redact", unreadable="keep")(_record(value)).value == value
    assert _masker("value.a=redact", unreadable="redact")(_record(value)).value == b"***"
    assert value not in (_masker("value=redact")(_record(value)).value or b"")


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("value.a", "is no FIELD=ACTION"),
        ("value.a=shred", "drop, redact, hash, fake"),
        ("user.email=hash", r"as in value\.user\.email=hash"),
        ("value..a=hash", "between two dots"),
        ("headers=hash", "name the header"),
    ],
)
def test_a_rule_that_is_none_is_a_sentence(rule: str, reason: str) -> None:
    with pytest.raises(MaskError, match=reason):
        parse_rule(rule)


def test_a_rule_is_written_as_it_was_read() -> None:
    for text in ("value.a.b=drop", "key=hash", "headers.x.y=fake", "value=redact"):
        assert str(parse_rule(text)) == text


_names = st.sampled_from(["a", "b", "c", "a.b"])
_secrets = st.text(min_size=6, max_size=12) | st.integers(10**6, 10**18) | st.floats(1e6, 1e12)
_documents = st.recursive(
    _secrets | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=10,
)


def _expected(node: Any, path: list[str], action: str) -> Any:
    """The rule by brute force: every field whose joined names are the path is replaced by None (or goes)."""

    def walk(node: Any, before: str) -> Any:
        if isinstance(node, list):
            return [walk(it, before) for it in node]
        if not isinstance(node, dict):
            return node
        kept = {}
        for name, value in node.items():
            place = f"{before}.{name}" if before else name
            if place != ".".join(path):
                kept[name] = walk(value, place)
            elif action != "drop":
                kept[name] = _MASKED
        return kept

    return walk(node, "")


_MASKED = "masked"


def _without_masked(node: Any, like: Any) -> Any:
    """What a masked document is, with _MASKED wherever the expected one has it."""
    if like == _MASKED:
        return _MASKED
    if isinstance(node, list) and isinstance(like, list):
        return [_without_masked(*pair) for pair in zip(node, like, strict=True)]
    if isinstance(node, dict) and isinstance(like, dict):
        assert node.keys() == like.keys()
        return {name: _without_masked(node[name], like[name]) for name in node}
    return node


@given(
    st.dictionaries(_names, _documents, max_size=3),
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3),
    st.sampled_from(ACTIONS),
)
def test_exactly_what_the_path_names_is_masked(document: dict[str, Any], path: list[str], action: str) -> None:
    text = json.dumps(document)
    masked = _masker(f"value.{'.'.join(path)}={action}")(_record(text.encode())).value
    assert masked is not None
    expected = _expected(json.loads(text, parse_float=Decimal), path, action)
    assert _without_masked(json.loads(masked, parse_float=Decimal), expected) == expected


def _scalars(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [it for value in node.values() for it in _scalars(value)]
    if isinstance(node, list):
        return [it for value in node for it in _scalars(value)]
    return [] if node is None or isinstance(node, bool) else [node]


@given(st.dictionaries(_names, _documents, min_size=1), st.sampled_from(["redact", "hash"]))
def test_nothing_of_a_masked_value_is_left(document: dict[str, Any], action: str) -> None:
    masked = _masker(f"value={action}")(_record(json.dumps(document).encode())).value
    assert masked is not None
    before, after = _scalars(document), _scalars(json.loads(masked))
    assert len(after) == len(before)
    assert not [it for it in after if it in before]


@given(st.dictionaries(_names, _documents, max_size=3))
def test_a_masked_document_keeps_its_shape(document: dict[str, Any]) -> None:
    def shape(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: shape(value) for name, value in node.items()}
        if isinstance(node, list):
            return [shape(it) for it in node]
        return "number" if isinstance(node, int | float) and not isinstance(node, bool) else type(node)

    for action in ("redact", "hash", "fake"):
        masked = _masker(f"value={action}")(_record(json.dumps(document).encode())).value
        assert shape(json.loads(masked or b"")) == shape(document)
