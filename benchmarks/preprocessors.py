"""Preprocessors and normalization of outputs against packflow 0.4.1, in one process, in turns, on the same records.

    python -m benchmarks.preprocessors [--rounds N] [--only WORD] [--json FILE]

Records come from ``orjson.loads``, as a worker's do, 512 a batch; packflow is the release that the tests compare with.
Before anything is timed both have to give identical outputs: types, order of keys, dtype and shape included. The one
difference that is allowed is documented: packflow leaves numpy's float64 and str as they are, where we give Python's.

Of outputs a third contestant takes part, the limit: numpy's own ``tolist`` of the whole, and a dict for each item, with
no look at what it is. Nobody who answers with Python's numbers can be faster than that, whatever the code.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from loguru import logger as packflows_log
from packflow.backend.configuration import BackendConfig as PackflowConfig
from packflow.backend.preprocessors import get_preprocessor as get_packflows
from packflow.utils.normalize import ensure_valid_output as packflows_ensure_valid_output

from benchmarks.turns import Spread, ratio, spread, take_turns
from streamproc.backend import BackendConfig
from streamproc.backend.normalize import ensure_valid_output
from streamproc.backend.preprocessors import get_preprocessor

BATCH = 512
TURN_S = 0.004
FIELDS = [f"field_{number}" for number in range(16)]
OTHERS = [f"other_{number}" for number in range(4)]


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that both do, and of outputs the least that Python needs for it; ``target`` is a ratio."""

    name: str
    packflow: Callable[[], Any]
    ours: Callable[[], Any]
    limit: Callable[[], Any] | None = None
    target: float | None = None


def flat_records(*, mixed: bool) -> list[dict[str, Any]]:
    """Twenty fields: sixteen numbers, every fourth of them an integer where ``mixed``, and four texts."""
    chance = random.Random(1)
    return [
        {
            **{
                name: chance.randrange(1_000) if mixed and number % 4 == 0 else chance.random()
                for number, name in enumerate(FIELDS)
            },
            **dict.fromkeys(OTHERS, f"text {index}"),
        }
        for index in range(BATCH)
    ]


def nested_records() -> list[dict[str, Any]]:
    """Twenty values in three levels, one of them a list."""
    chance = random.Random(2)
    return [
        {
            **{f"field_{number}": chance.random() for number in range(8)},
            "user": {
                "id": index,
                "name": "somebody",
                "age": index % 90,
                "geo": {"lat": chance.random(), "lon": chance.random(), "place": {"city": "Dow", "zip": index}},
            },
            "item": {"sku": str(index), "price": {"amount": chance.random(), "currency": "EUR"}, "tags": ["a", "b"]},
        }
        for index in range(BATCH)
    ]


def as_decoded(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records as a worker has them."""
    return [orjson.loads(orjson.dumps(record)) for record in records]


def preprocessor_cases() -> list[Case]:
    """The configurations."""
    flat, floats = as_decoded(flat_records(mixed=True)), as_decoded(flat_records(mixed=False))
    nested = as_decoded(nested_records())
    missing = [{name: value for name, value in record.items() if name != "field_9"} for record in flat]
    paths = ["user.id", "user.geo.lat", "user.geo.place.city", "item.price.amount"]
    renames = {name: f"new_{name}" for name in FIELDS[:4]}
    told: list[tuple[str, dict[str, Any], list[dict[str, Any]], float | None]] = [
        ("filter, 16 of 20 fields", {"feature_names": FIELDS}, flat, 5),
        ("filter, a field missing", {"feature_names": FIELDS}, missing, 5),
        ("rename 4 and filter 12", {"rename_fields": renames, "feature_names": FIELDS[4:]}, flat, 5),
        ("rename 4, keep all", {"rename_fields": renames}, flat, None),
        ("filter, nested", {"feature_names": paths}, nested, None),
        ("rename, nested", {"rename_fields": {"user.id": "id", "user.geo.lat": "geo.lat"}}, nested, None),
        ("flatten", {"flatten_nested_inputs": True}, nested, 8),
        ("flatten, lists too", {"flatten_nested_inputs": True, "flatten_lists": True}, nested, None),
        ("flatten and filter", {"flatten_nested_inputs": True, "feature_names": paths}, nested, 8),
        ("numpy, 16 floats", {"input_format": "numpy", "feature_names": FIELDS}, floats, 3),
        ("numpy, floats and integers", {"input_format": "numpy", "feature_names": FIELDS}, flat, 3),
        (
            "numpy, 4 nested",
            {"input_format": "numpy", "feature_names": ["user.age", *paths[1::2], "user.geo.lon"]},
            nested,
            30,
        ),
    ]
    return [_preprocessor_case(*case) for case in told]


def _preprocessor_case(name: str, values: dict[str, Any], records: list[dict[str, Any]], target: float | None) -> Case:
    packflows, ours = get_packflows(PackflowConfig(**values)), get_preprocessor(BackendConfig(**values))
    return Case(name, lambda: packflows(records), lambda: ours(records), target=target)


def output_cases() -> list[Case]:
    """What models return."""
    numbers = np.random.default_rng(3)
    wide, narrow = numbers.random((BATCH, 384)).astype("f4"), numbers.random((BATCH, 4))
    column, classes = narrow[:, 0].astype("f4"), numbers.integers(0, 10, BATCH)
    objects = np.empty((BATCH, 4), dtype=object)
    objects[:] = [[index, 0.5, "a", None] for index in range(BATCH)]
    arrays: list[tuple[str, Any]] = [
        ("array of integers", classes),
        ("array of booleans", column > 0.5),
        ("array of float32", column),
        ("array of float64", narrow[:, 0].copy()),
        ("array of times", classes.astype("M8[s]")),
        ("array, 1 column", column.reshape(-1, 1)),
        ("array, 4 columns of integers", (narrow * 100).astype("i8")),
        ("array, 4 columns", narrow),
        ("array, 16 columns", wide[:, :16].copy()),
        ("array, 384 columns", wide),
        ("array, 2 × 2 items", narrow.reshape(-1, 2, 2)),
        ("array of objects, 4 columns", objects),
    ]
    lists: list[tuple[str, Any]] = [
        ("list of float32", list(column)),
        ("list of float64", list(narrow[:, 0])),
        ("list of integers", list(classes)),
        ("list of rows of 16", list(wide[:, :16].copy())),
        ("list of Python's floats", narrow[:, 0].tolist()),
        ("list of lists of 16", wide[:, :16].tolist()),
        ("dicts of a row and a number", [{"y": y, "p": p} for y, p in zip(wide[:, :16].copy(), column, strict=True)]),
        ("dicts of Python's values", [{"label": "cat", "p": 0.5, "box": [0.5, 1.5, 2.5, 3.5]} for _ in range(BATCH)]),
    ]
    return [
        Case(
            name,
            lambda output=output: packflows_ensure_valid_output(output),  # type: ignore[misc]  # of a default
            lambda output=output: ensure_valid_output(output),  # type: ignore[misc]  # as above
            lambda output=output: _least(output),  # type: ignore[misc]  # as above
            5 if isinstance(output, np.ndarray) else None,
        )
        for name, output in [*arrays, *lists]
    ]


def _least(output: Any) -> list[Any]:
    """The least of work that makes such outputs, without a look at what they are."""
    if isinstance(output, np.ndarray):
        return [{"output": item} for item in (output.ravel() if output.shape[1:] == (1,) else output).tolist()]
    first = output[0]
    if isinstance(first, np.ndarray):
        return [{"output": item} for item in map(np.ndarray.tolist, output)]
    if isinstance(first, np.generic):
        return [{"output": item} for item in np.fromiter(output, dtype=type(first)).tolist()]
    if isinstance(first, dict) and isinstance(first.get("y"), np.ndarray):
        return [{"y": item["y"].tolist(), "p": float(item["p"])} for item in output]
    if isinstance(first, dict):
        return [item.copy() for item in output]
    return [{"output": item.copy() if isinstance(item, list) else item} for item in output]


def differs(theirs: Any, ours: Any) -> str | None:
    """Where two outputs are not alike in type, order and content; None where they are."""
    if isinstance(theirs, np.float64 | np.str_):
        theirs = theirs.item()
    if type(theirs) is not type(ours):
        return f"{type(theirs).__name__} and {type(ours).__name__}"
    if isinstance(theirs, np.ndarray) and (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        return f"{theirs.dtype}{theirs.shape} and {ours.dtype}{ours.shape}"
    if isinstance(theirs, dict) and list(theirs) != list(ours):
        return f"keys {list(theirs)} and {list(ours)}"
    if isinstance(theirs, np.ndarray | dict | list):
        theirs, ours = _items(theirs), _items(ours)
        if len(theirs) != len(ours):
            return f"{len(theirs)} items and {len(ours)}"
        found = (f"[{at}]: {why}" for at, (a, b) in enumerate(zip(theirs, ours, strict=True)) if (why := differs(a, b)))
        return next(found, None)
    return None if repr(theirs) == repr(ours) else f"{theirs!r} and {ours!r}"


def _items(value: Any) -> list[Any]:
    return (
        list(value.values()) if isinstance(value, dict) else value.tolist() if isinstance(value, np.ndarray) else value
    )


def run(case: Case, rounds: int) -> dict[str, Any]:
    """Verify and time one case."""
    for _ in range(2):  # a preprocessor that learns answers a second time otherwise than the first
        if (why := differs(case.packflow(), case.ours())) is not None:
            raise SystemExit(f"{case.name}: the outputs differ: {why}")
    contestants = {"packflow": case.packflow, "streamproc": case.ours}
    if case.limit is not None:
        contestants["limit"] = case.limit
    taken = take_turns(contestants, rounds=rounds, turn_s=TURN_S)
    against: Spread = ratio(taken["packflow"], taken["streamproc"])
    result: dict[str, Any] = {
        "case": case.name,
        "us_a_record": {
            name: spread([second / BATCH * 1e6 for second in seconds]).as_json() for name, seconds in taken.items()
        },
        "ratio": against.as_json(),
        "target": case.target,
    }
    if case.limit is not None:
        result["limit_ratio"] = ratio(taken["packflow"], taken["limit"]).as_json()
    return result


def line(result: dict[str, Any]) -> str:
    """A result as a row of the table."""
    cost, against, target = result["us_a_record"], result["ratio"], result["target"]
    verdict = "" if target is None else f"  ≥ {target:<2g} {'met' if against['median'] >= target else 'BELOW'}"
    limit = f"  (limit {result['limit_ratio']['median']:.1f})" if "limit_ratio" in result else ""
    return (
        f"{result['case']:<29} {cost['packflow']['median']:7.2f} {cost['streamproc']['median']:7.2f}  "
        f"{against['median']:6.1f} ({against['low']:.1f} to {against['high']:.1f}){verdict}{limit}"
    )


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", default="", help="the cases with this in their name")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    packflows_log.disable("packflow")
    release = importlib.metadata.version("packflow")
    print(f"packflow {release}, batches of {BATCH}, {arguments.rounds} rounds; µs of CPU a record; outputs identical")
    print(f"{'':<29} packflow  ours   times as fast (quartiles)")
    results = []
    for case in [*preprocessor_cases(), *output_cases()]:
        if arguments.only in case.name:
            results.append(run(case, arguments.rounds))
            print(line(results[-1]), flush=True)
    if arguments.json:
        about = {"packflow": release, "python": platform.python_version(), "numpy": np.__version__, "batch": BATCH}
        arguments.json.write_text(
            json.dumps({**about, "rounds": arguments.rounds, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
