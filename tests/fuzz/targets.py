"""The targets by name, for the tests and for the long run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

NAMES = ("wire", "settings", "decoding", "formats")


class Target(NamedTuple):
    """What is run on each input, and inputs to begin with."""

    check: Callable[[bytes], None]
    seeds: Sequence[bytes]


def target(name: str) -> Target:
    """The target of this name; its module, and what that tests, is imported now."""
    module = importlib.import_module(f"tests.fuzz.{name}")
    return Target(cast("Callable[[bytes], None]", module.check), cast("Sequence[bytes]", module.SEEDS))
