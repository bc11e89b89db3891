"""Real texts of any length, from any Python installation: what the standard library says of itself.

    python texts.py --count 1000 --seed 1                      sentences for the task of streamproc.yaml
    python texts.py --count 200 --kind passage                 what functions and classes do
    python texts.py --count 50 --kind query                    the first words of such texts, as questions

Docstrings of modules, classes and functions, read from the source files without importing them; each is a text, and
those that are longer than a length drawn for them are cut there. Lengths are lognormal, so that most texts are short
and some are many times as long. The same Python, count and seed give the same texts.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MEDIAN_CHARS, SPREAD, LEAST_CHARS, MOST_CHARS = 160, 0.9, 12, 1_000
SKIPPED = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "__pycache__")


def docstrings() -> list[tuple[str, str]]:
    """The name and the docstring of everything in the standard library that has one, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if any(part in SKIPPED for part in parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        found += list(_of(tree, module))
    return found


def _of(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) >= LEAST_CHARS:
            yield name, " ".join(text.split())
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _of(child, f"{name}.{child.name}")


def texts(count: int, seed: int, *, kind: str = "text") -> Iterator[dict[str, str]]:
    """So many records.

    Args:
        count: How many.
        seed: Chooses the texts and their lengths.
        kind: ``text``: a text of any length; ``passage``: a title and a whole text, to a limit; ``query``: a question.
    """
    rng = random.Random(seed)  # noqa: S311 - a choice of texts, no secret
    known = docstrings()
    for number in range(count):
        name, text = known[rng.randrange(len(known))]
        if kind == "passage":
            yield {"id": str(number), "title": name, "text": _cut(text, MOST_CHARS)}
        elif kind == "query":
            yield {"id": str(number), "text": f"What does this: {_cut(text, 60)}?"}
        else:
            wanted = min(max(rng.lognormvariate(math.log(MEDIAN_CHARS), SPREAD), LEAST_CHARS), MOST_CHARS)
            # Most docstrings are short: several make a text of the wanted length.
            while len(text) < wanted:
                text += " " + known[rng.randrange(len(known))][1]
            yield {"id": str(number), "text": _cut(text, round(wanted))}


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    at = text.rfind(" ", LEAST_CHARS, most + 1)
    return text[: at if at > 0 else most]


def main() -> None:
    """Write lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=("text", "passage", "query"), default="text")
    options = parser.parse_args()
    for record in texts(options.count, options.seed, kind=options.kind):
        print(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    main()
