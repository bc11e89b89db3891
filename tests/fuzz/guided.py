"""The process in which atheris runs one target, guided by the coverage of streamproc and of the target; see ``run``.

Its arguments are the target's name and libFuzzer's options. libFuzzer ends the process itself: at the end of its time,
at the first input that fails, takes too long or too much memory, which it writes to a file.
"""

from __future__ import annotations

import logging
import sys

import atheris

from tests.fuzz.targets import target


def main() -> None:
    """Run until libFuzzer ends the process."""
    name, *options = sys.argv[1:]
    # What the code under test logs is its own affair; nobody could read it at thousands of inputs a second.
    logging.lastResort = None
    with atheris.instrument_imports(include=["streamproc", "tests.fuzz"]):
        check, _ = target(name)
    atheris.Setup([sys.argv[0], *options], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
