"""Fuzzes the settings: the file, the environment over it, and what `streamproc config show` prints of them.

- Any bytes as file and any variables give ``Settings``, or a ``SettingsError`` of one printable line of bounded length.
- No password is in a message, whatever is wrong with its line, nor in the settings' ``repr``, nor in what is shown.
- What is shown of valid settings is a file that gives the same settings.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from streamproc.cli.config import _yaml, shown_settings
from streamproc.errors import SettingsError
from streamproc.settings import Settings
from streamproc.settings_loading import Loaded, json_schema, load_with_places
from streamproc.settings_loading.environment import SEED_VARIABLE, _known_variables
from tests.fuzz.take import Take, mutated

SECRET = "Qz8fuzzSecret7Xw"  # noqa: S105 - what no message may repeat
NUMBER = "8675309042911"
MOST_CHARS = 4_000
MINIMAL = 'name: app\nbackend: {path: "inference:Backend"}\ntasks: {text: {input: {topics: [in]}}}\n'
COMPLETE = """\
name: app
kafka:
  bootstrap_servers: a:1, b:2
  security_protocol: SASL_SSL
  sasl_username: me
  sasl_password_file: file.pem
backend: &backend
  path: inference:Backend
  config: {a: [1, 2.5, null, true, x], when: 2024-01-01, password: "x y"}
pool:
  workers: 0x2
  env: {OMP_NUM_THREADS: "1", API_TOKEN: hidden}
  recycle: {max_batches: ~}
tasks:
  text: &text
    input: {topics: [in]}
    batch: {max_wait_ms: 1e1}
  image-large:
    <<: *text
    input:
      topics:
        - images
    output: {topic: out}
    ordering: key
"""
SEEDS = [
    b"\0" + MINIMAL.encode(),
    b"\0" + COMPLETE.encode(),
    b"\0" + b"a: &a {<<: [*a, *a]}\n",
    *(bytes([mode, size, *range(size, 256, 7)]) for mode in (1, 2, 3, 4) for size in (0, 1, 3, 50)),
]

# In memory where there is such a folder: opening a file is most of the work.
_SHM = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in it
_FOLDER = Path(tempfile.mkdtemp(prefix="streamproc-fuzz-", dir=_SHM if _SHM.is_dir() else None))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
_FILE = _FOLDER / "streamproc.yaml"
(_FOLDER / "topics").mkdir()
(_FOLDER / "file.pem").write_text("x")
_SCHEMA = json_schema()
_VARIABLES = [f"STREAMPROC_{name}" for name in _known_variables()]

_LOG = logging.getLogger("streamproc.settings_loading")


def check(data: bytes) -> None:
    """One input; raises AssertionError, or whatever the code under test should not have raised."""
    _LOG.disabled = True
    try:
        _check(Take(data))
    finally:
        _LOG.disabled = False


def _check(take: Take) -> None:
    match take.below(5):
        case 0:
            _load(take.rest(), {})
        case 1:
            _load(b"".join(take.one_of(_FRAGMENTS) for _ in range(take.below(64))), {})
        case 2:
            _from_the_schema(take)
        case 3:
            _load((MINIMAL if take.bit() else COMPLETE).encode(), dict(_variables(take)))
        case _:
            _with_a_password(take)


def _load(text: bytes, environ: Mapping[str, str], *, secret: bool = False) -> Loaded | None:
    _FILE.write_bytes(text)
    try:
        loaded = load_with_places(_FILE, environ)
    except SettingsError as error:
        for said in (str(error), repr(error), repr(error.args), *map(str, vars(error).values())):
            assert not secret or (SECRET not in said and NUMBER not in said), f"the password is in: {said}"
        message = str(error)
        assert len(message) <= MOST_CHARS
        assert message.isprintable(), f"not one printable line: {message!r}"
        assert len(message) > 10
        return None
    assert not secret or SECRET not in repr(loaded.settings.kafka)
    _show_and_load_again(loaded, secret=secret)
    return loaded


def _show_and_load_again(loaded: Loaded, *, secret: bool) -> None:
    shown = shown_settings(loaded.settings)
    lines = "\n".join(_yaml(shown, loaded.place_of, 120))
    if secret:
        for value in _values(shown):
            assert SECRET not in value, f"the password is shown: {value}"
            assert NUMBER not in value, f"the password is shown: {value}"
    _FILE.write_text(lines, encoding="utf-8")
    try:
        again = load_with_places(_FILE, {})
    except SettingsError as error:
        raise AssertionError(f"what is shown cannot be loaded: {error}\n{lines}") from error
    assert shown_settings(again.settings) == shown, lines
    assert isinstance(again.settings, Settings)


def _values(shown: Any) -> Iterator[str]:
    if isinstance(shown, dict | list):
        for inner in shown.values() if isinstance(shown, dict) else shown:
            yield from _values(inner)
    else:
        yield str(shown)


# -- text

_FRAGMENTS = [
    *(piece.encode() for piece in MINIMAL.splitlines(keepends=True)),
    *(piece.encode() for piece in COMPLETE.splitlines(keepends=True)),
    *(b"\n", b"  ", b": ", b"- ", b"? ", b"{", b"}", b"[", b"]", b", ", b"&a ", b"*a", b"<<: *a\n", b"<<: [*a, *a]\n"),
    *(b"!!binary ", b"!!set ", b"!!omap ", b"!!int ", b"!!float ", b"!!str ", b"!!null ", b"!!timestamp ", b"!x "),
    *(b"# c\n", b"---\n", b"...\n", b"%YAML 1.1\n", b"'", b'"', b"|\n", b">-\n", b"\t", b"\r", b"\0", b"\x85", b"~"),
    *(b"=", b"2001-99-99", b"2001-01-01", b"1:1:1:1", b"0b_", b"0x" + b"f" * 4_000, b"9" * 4_400, b".inf", b".nan"),
    *(
        b"1e400",
        b"0o7",
        b"-0",
        b"yes",
        b"\xe2\x80\xa8",
        b"\xff",
        b"\xef\xbb\xbf",
        b'"\\ud800"',
        b'"\\0"',
        b"\xf0\x9f\x98\x80",
    ),
    *(b"[" * 400, b"]" * 400, b"{a: " * 300, b"- " * 300, b"1:" * 3_000, b"x" * 1_100, b"a: &a {b: &b {c: *a}}\n"),
    *(b"pool: {", b"kafka: {", b"name: ", b"http:\n  ", b"tasks:\n  ", b"topics_dir: ", b"logging: {level: "),
]

# -- settings by their schema

_WORDS = ["app", "in", "out", "a.b-c_d", "file.pem", "topics", "localhost:9092", "x" * 100, "y" * 250, "", "a b"]
_ODD = [
    *("null", "true", "0", "-1", "1.5", ".inf", ".nan", "-.inf", "1e400", "9" * 30, "9" * 5_000, "0x" + "f" * 5_000),
    *("[]", "{}", "[a]", "{a: 1}", "[[[[]]]]", '""', '"a\\nb"', '"a\\0b"', '"\\u2028"', '"\\x1b[31m"', "x" * 5_000),
    *(
        "2001-01-01",
        "2001-01-01 01:01:01",
        "2001-99-99",
        "!!binary YQ==",
        "!!set {a}",
        "!!omap [a: 1]",
        "!x y",
        "=",
        "~",
    ),
    *('"\\ud83d"', '"😀"', "1:1:1", "2147483648", "1e300", "-5", "65536", "/", "..", "/nowhere", "on", "*a", "&a b"),
]


def _from_the_schema(take: Take) -> None:
    tree = _sample(_SCHEMA, take)
    for _ in range(take.below(3)):
        _change(tree, take)
    text = _flow(tree)
    if take.below(4) == 0:
        text = mutated(text.encode(), take).decode("utf-8", "replace")
    environ = dict(_variables(take)) if take.below(4) == 0 else {}
    _load(text.encode("utf-8", "replace"), environ)


def _sample(schema: Mapping[str, Any], take: Take) -> Any:  # noqa: PLR0911 - a way each
    """A value that the schema allows, mostly; scalars are YAML text."""
    if "$ref" in schema:
        return _sample(_SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], take)
    if "anyOf" in schema:
        return _sample(take.one_of(schema["anyOf"]), take)
    if "enum" in schema:
        return orjson.dumps(take.one_of(schema["enum"])).decode()
    match schema.get("type"):
        case "object" if "properties" in schema:
            required = schema.get("required", [])
            return {
                key: _sample(inner, take)
                for key, inner in schema["properties"].items()
                if key in required or take.below(4) == 0
            }
        case "object":
            inner = schema.get("additionalProperties")
            inner = inner if isinstance(inner, dict) else {}
            return {take.one_of(_WORDS[:4]): _sample(inner, take) for _ in range(1 + take.below(2))}
        case "array":
            return [_sample(schema.get("items", {}), take) for _ in range(1 + take.below(2))]
        case "integer" | "number" as kind:
            least = schema.get("minimum", schema.get("exclusiveMinimum", 0))
            number = min(least + take.one_of((0, 1, 10, 1_000, 60_000, 10**6)), schema.get("maximum", 10**9))
            return str(number) if kind == "integer" or take.bit() else f"{float(number)!r}"
        case "boolean":
            return "true" if take.bit() else "false"
        case "null":
            return "null"
        case "string":
            return orjson.dumps(take.one_of(_WORDS)).decode()
    return take.one_of(_ODD)


def _change(tree: Any, take: Take) -> None:
    """Somewhere in the tree: another value, another key, one key less."""
    nodes = list(_nodes(tree))
    node, key = nodes[take.below(len(nodes))]
    match take.below(5):
        case 0 if isinstance(node, dict):
            node[take.one_of((*_ODD, "nam", "kafak", "max_size", "1", "~", "'a\"b'", "? x"))] = node.pop(key)
        case 1:
            del node[key]
        case 2:
            node[key] = _sample(_SCHEMA, take)
        case _:
            node[key] = take.one_of(_ODD)


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(inner, dict | list):
            yield from _nodes(inner)


def _flow(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in tree.items()) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(_flow, tree)) + "]"
    return str(tree)


# -- the environment


def _variables(take: Take) -> Iterator[tuple[str, str]]:
    for _ in range(1 + take.below(3)):
        name = take.one_of(
            [
                *_VARIABLES,
                *(
                    "STREAMPROC_TASKS",
                    "STREAMPROC_TASKS__TEXT__BATCH__MAX_SIZE",
                    "STREAMPROC_TASKS__TEXT__INPUT__TOPICS",
                ),
                *("STREAMPROC_TASKS__OTHER__BATCH", "STREAMPROC_TASKS__TEXT", "STREAMPROC_TASKS__", "STREAMPROC___"),
                *(
                    "STREAMPROC_BACKEND__CONFIG__A__B__C",
                    "STREAMPROC_POOL__ENV__X",
                    "STREAMPROC_NAME__X",
                    "STREAMPROC_",
                ),
                *(
                    SEED_VARIABLE,
                    f"{SEED_VARIABLE}_TEXT",
                    f"{SEED_VARIABLE}_",
                    "STREAMPROC_KAFKA__\udcff",
                    "STREAMPROC_İ",
                ),
            ]
        )
        if take.below(4) == 0:
            name = mutated(name.encode("utf-8", "surrogateescape"), take).decode("utf-8", "surrogateescape")
        if take.bit():
            name = name.lower()
        text = take.one_of(
            [
                *(
                    "",
                    "1",
                    "0",
                    "null",
                    "true",
                    "text",
                    "[]",
                    "{}",
                    '["a"]',
                    '{"a": 1}',
                    "\udcff",
                    '"\\ud800"',
                    "9" * 5_000,
                ),
                *(
                    "[" * 50_000,
                    '{"a":' * 900 + "1" + "}" * 900,
                    "1e400",
                    "NaN",
                    "[NaN]",
                    "-1",
                    '{"input": {"topics": ["in"]}}',
                ),
                *(
                    '{"text": {"input": {"topics": ["a"]}}}',
                    '{"text": null}',
                    '{"": {}}',
                    '{"a": {"a": {"a": []}}}',
                    "a\nb",
                ),
            ]
        )
        if take.below(4) == 0:
            text = take.blob(40).decode("utf-8", "surrogateescape")
        yield name.replace("\0", ""), text.replace("\0", "")


# -- passwords

_SEPARATORS = [": ", ":", "=", " = ", ":\t", " : ", ": - ", ":\n    ", ":\n  - ", ": [", ": {", ": {a: ", ": [["]
_PREFIXES = [
    "",
    "*",
    "!",
    "!!",
    "&",
    "%",
    "@",
    "`",
    "|",
    ">",
    '"',
    "'",
    "!!binary ",
    "!!int ",
    "!!timestamp ",
    "0x",
    "\\",
    "#",
]
_SUFFIXES = [
    "",
    '"',
    "'",
    "]",
    "}",
    "]]",
    ": x",
    ": [",
    ", b: 1}",
    "\n  sasl_password: again",
    "\t",
    " #",
    "\\",
    "\0",
    "\x7f",
]
_PLACES: list[Callable[[str], str]] = [
    lambda line: f"kafka:\n  sasl_password{line}\n",
    lambda line: f"kafka:\n  security_protocol: SASL_SSL\n  sasl_password{line}\n  sasl_username: 1\n",
    lambda line: f"kafka:\n  sasl_password{line}\n  sasl_password_file: nowhere\n",
    lambda line: f"kafka: {{sasl_password{line}}}\n",
    lambda line: f"kafka:\n  sasl_pasword{line}\n",
    lambda line: f"pool:\n  env:\n    API_TOKEN{line}\n",
    lambda line: f"pool: {{env: {{API_TOKEN{line}}}}}\n",
    lambda line: f"backend:\n  path: m:B\n  config:\n    db:\n      - password{line}\n",
]


def _with_a_password(take: Take) -> None:
    secret = SECRET if take.below(4) else NUMBER
    if take.below(8) == 0:
        name = take.one_of(("STREAMPROC_KAFKA__SASL_PASSWORD", "STREAMPROC_KAFKA", "STREAMPROC_POOL__ENV__API_TOKEN"))
        text = take.one_of(
            ("{}", '["{}"]', '{{"sasl_password": "{}"}}', '{{"sasl_password": ["{}"', "'{}'", "{}\n{}\udcff")
        )
        _load(MINIMAL.encode(), {name: text.format(secret, secret)}, secret=True)
        return
    line = take.one_of(_SEPARATORS) + take.one_of(_PREFIXES) + secret + take.one_of(_SUFFIXES)
    file = take.one_of(_PLACES)(line)
    minimal = MINIMAL.replace('backend: {path: "inference:Backend"}\n', "") if file.startswith("backend") else MINIMAL
    _load((minimal + file if take.bit() else file + minimal).encode(), {}, secret=True)
