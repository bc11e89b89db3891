"""Masks personal data while records are captured: rules for fields of the value, the key and the headers. Pure.

A rule is ``FIELD=ACTION``. The field begins with the part of the record that it is in, as in a line of a capture file:
``value.user.email``, ``key``, ``headers.session``. Lists are entered: ``value.items.owner`` is the owner of every item.
What a rule names is masked with everything below it; ``value`` and ``key`` alone are the whole of them.

    drop     the field goes
    redact   text becomes ***, a number 0, true false; lists and objects keep their shape
    hash     text becomes 16 hexadecimal digits, a number another number
    fake     every letter becomes another letter, every digit another digit; the rest stays: a date looks like one

Invariants:

- ``hash`` and ``fake`` follow from the salt and the text alone, so what was equal stays equal, in all fields, keys,
  headers, topics and captures with one salt: 7, "7" and the key 7 become the same number.
- What no rule names stays as it is, numbers digit by digit; white space between JSON's tokens goes, and of names that
  an object has twice the last one counts.
- ``null`` stays null; a masked record has the topic, partition, offset and timestamp that it had.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from streamproc.errors import StreamprocError
from streamproc.record_lines import PlacedRecord
from streamproc.records import TopicRecord

Action = Literal["drop", "redact", "hash", "fake"]
ACTIONS: tuple[Action, ...] = ("drop", "redact", "hash", "fake")
Unreadable = Literal["stop", "redact", "keep"]
"""What to do with a value, or a key, that is no JSON where a rule names a field in it."""

REDACTED = "***"
_HASHED_BELOW = 1_000_000_000_000_000
"""And below 2⁵³, so that whoever reads numbers as floats has them right."""
_INTEGER = re.compile(r"-?[0-9]+")
_MANTISSA = re.compile(r"([^eE]*)(.*)")


class MaskError(StreamprocError):
    """A rule is none, or a record cannot be masked."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """What to do with a field. ``part`` is ``value``, ``key`` or ``headers``; ``path`` what follows, split at dots."""

    part: str
    path: tuple[str, ...]
    action: Action

    def __str__(self) -> str:
        return f"{'.'.join((self.part, *self.path))}={self.action}"


def parse_rule(text: str) -> Rule:
    """A rule as it is written: ``value.user.email=hash``. Raises MaskError."""
    field, separator, action = text.rpartition("=")
    if not separator or action not in ACTIONS:
        raise MaskError(f"--mask {text}: is no FIELD=ACTION with an action of {', '.join(ACTIONS)}")
    part, *path = field.split(".")
    if part not in ("value", "key", "headers"):
        raise MaskError(
            f"--mask {text}: a field begins with value, key or headers, as in value.{field}={action}, key={action} or "
            f"headers.{field}={action}"
        )
    if "" in path:
        raise MaskError(f"--mask {text}: a name between two dots is missing")
    if part == "headers":
        if not path:
            raise MaskError(f"--mask {text}: name the header, as in headers.session={action}")
        path = [".".join(path)]
    return Rule(part, tuple(path), action)


class Masker:
    """Masks records, and counts what each rule matched.

    Args:
        rules: What to mask; several that name one field are applied one after the other.
        salt: What ``hash`` and ``fake`` depend on, beside the text. Who has it can find out texts by trying.
        unreadable: What to do with a value that is no JSON where a rule names a field in it: ``stop`` raises,
            ``redact`` replaces it as a whole, ``keep`` leaves it unmasked.
    """

    def __init__(self, rules: Sequence[Rule], salt: bytes, unreadable: Unreadable = "stop") -> None:
        self.matched = dict.fromkeys(rules, 0)
        """How many fields each rule has masked."""
        self._unreadable = unreadable
        self._masks: dict[Action, _Mask] = {
            "drop": lambda _: None,
            "redact": _redacted,
            "hash": _Hash(salt),
            "fake": _Fake(salt),
        }
        self._by_part = {part: [rule for rule in rules if rule.part == part] for part in ("value", "key", "headers")}

    def __call__(self, record: TopicRecord) -> PlacedRecord:
        """The record, masked. Raises MaskError where it cannot be, unless told what to do then."""
        return PlacedRecord(
            record.topic,
            record.partition,
            record.offset,
            record.timestamp,
            self._part("key", record.key, record),
            self._part("value", record.value, record),
            self._headers(record.headers),
        )

    def _part(self, part: str, content: bytes | None, record: TopicRecord) -> bytes | None:
        rules = self._by_part[part]
        fields = [rule for rule in rules if rule.path]
        if content is not None and fields:
            try:
                content = self._fields(content, fields)
            except (ValueError, TypeError, RecursionError):
                if self._unreadable == "stop":
                    raise MaskError(
                        f"the {part} of topic {record.topic}, partition {record.partition}, offset {record.offset} is "
                        f"no JSON, and --mask {fields[0]} names a field in it; --mask-unreadable redact masks such a "
                        f"{part} as a whole, keep leaves it as it is"
                    ) from None
                if self._unreadable == "redact":
                    content = REDACTED.encode()
        for rule in rules:
            if content is not None and not rule.path:
                self.matched[rule] += 1
                content = self._whole(content, rule.action)
        return content

    def _fields(self, content: bytes, rules: Sequence[Rule]) -> bytes:
        """JSON with fields masked; as it was where there are none. Raises ValueError where it is no JSON."""
        document = _parsed(content)
        changed = 0
        for rule in rules:
            found = _mask_fields(document, rule.path, self._masks[rule.action], drop=rule.action == "drop")
            self.matched[rule] += found
            changed += found
        return _dumped(document) if changed else content

    def _whole(self, content: bytes, action: Action) -> bytes | None:
        """All of a key, or of a value: within JSON with structure everything, else the bytes as one text."""
        if action == "drop":
            return None
        mask = self._masks[action]
        if content[:1] in (b"{", b"["):
            try:
                return _dumped(_masked(_parsed(content), mask))
            except (ValueError, RecursionError, TypeError):
                pass  # no JSON after all: a text as any other
        # Bytes that are no text become one of their own, so that what was equal stays equal.
        return str(mask(content.decode(errors="backslashreplace"))).encode()

    def _headers(self, headers: Sequence[tuple[str, bytes | None]]) -> list[tuple[str, bytes | None]]:
        masked = list(headers)
        for rule in self._by_part["headers"]:
            name = rule.path[0]
            found = sum([1 for it, _ in masked if it == name])
            if not found:
                continue
            self.matched[rule] += found
            masked = [
                (it, self._whole(value, rule.action) if it == name and value is not None else value)
                for it, value in masked
                if it != name or rule.action != "drop"
            ]
        return masked


class _Number(str):
    """A number: its digits as they stand in the record."""

    __slots__ = ()


_Scalar = str | bool | _Number
_Mask = Callable[[_Scalar], Any]


def _parsed(content: bytes) -> Any:
    """JSON whose numbers keep their digits. Raises ValueError."""
    return json.loads(content.decode(), parse_int=_Number, parse_float=_Number, parse_constant=_no_constant)


def _dumped(document: Any) -> bytes:
    """Raises TypeError where a text is none: half of a surrogate pair."""
    return orjson.dumps(document, default=_as_it_stands, option=orjson.OPT_PASSTHROUGH_SUBCLASS)


def _as_it_stands(number: _Number) -> orjson.Fragment:
    return orjson.Fragment(str(number))  # it takes no subclasses


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _mask_fields(node: Any, path: tuple[str, ...], mask: _Mask, *, drop: bool) -> int:
    """Mask what a path names below a node; how many fields were."""
    if type(node) is list:
        return sum([_mask_fields(it, path, mask, drop=drop) for it in node])
    if type(node) is not dict:
        return 0
    found = 0
    for length in range(1, len(path) + 1):  # a name may have dots in it
        name, rest = ".".join(path[:length]), path[length:]
        if name not in node:
            continue
        if rest:
            found += _mask_fields(node[name], rest, mask, drop=drop)
            continue
        found += 1
        if drop:
            del node[name]
        else:
            node[name] = _masked(node[name], mask)
    return found


def _masked(node: Any, mask: _Mask) -> Any:
    """A node with every text, number and boolean in it masked."""
    if type(node) is dict:
        return {name: _masked(it, mask) for name, it in node.items()}
    if type(node) is list:
        return [_masked(it, mask) for it in node]
    return None if node is None else mask(node)


def _redacted(value: _Scalar) -> str | bool | int:
    if isinstance(value, bool):
        return False
    return 0 if type(value) is _Number else REDACTED


class _Hash:
    def __init__(self, salt: bytes) -> None:
        self._key = _key(salt, b"hash")

    def __call__(self, value: _Scalar) -> str | bool | int:
        if isinstance(value, bool):
            return False  # of two values a hash hides nothing
        # Half of a surrogate pair, which JSON may hold, is no UTF-8.
        digest = hashlib.blake2b(value.encode(errors="surrogatepass"), key=self._key, digest_size=8).digest()
        number = int.from_bytes(digest) % _HASHED_BELOW
        if type(value) is _Number:
            return number
        return str(number) if _INTEGER.fullmatch(value) else digest.hex()


class _Fake:
    def __init__(self, salt: bytes) -> None:
        self._key = _key(salt, b"fake")

    def __call__(self, value: _Scalar) -> str | bool | _Number:
        if isinstance(value, bool):
            return False
        chance = self._chance(value)
        if type(value) is _Number:
            mantissa, exponent = _MANTISSA.fullmatch(value).groups()  # type: ignore[union-attr] # any text matches
            return _Number(_fake_digits(mantissa, chance) + exponent)
        if _INTEGER.fullmatch(value):
            return _fake_digits(value, chance)
        return "".join([_fake_character(it, chance) for it in value])

    def _chance(self, text: str) -> Iterator[int]:
        """Bytes without end that follow from the text."""
        encoded, block = text.encode(errors="surrogatepass"), 0
        while True:
            yield from hashlib.blake2b(block.to_bytes(8) + encoded, key=self._key).digest()
            block += 1


def _fake_character(character: str, chance: Iterator[int]) -> str:
    if character.isdigit():
        return chr(ord("0") + next(chance) % 10)
    if character.isalpha():
        return chr(ord("A" if character.isupper() else "a") + next(chance) % 26)
    return character


def _fake_digits(text: str, chance: Iterator[int]) -> str:
    """A number of as many digits, the first from 1 to 8: no zero leads, and 19 digits stay below 2⁶³."""
    faked, first = [], True
    for character in text:
        if not character.isdigit():
            faked.append(character)
            continue
        faked.append(str(next(chance) % 8 + 1 if first else next(chance) % 10))
        first = False
    return "".join(faked)


def _key(salt: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(salt, person=purpose).digest()
