"""The sentence encoder of ``examples/sentences``, for benchmarks and tests: its environment, and its texts.

    python -m benchmarks.sentences          makes the environment, and encodes two sentences to see that it works

The packages of its requirements are installed into a folder of their own, ``build/sentences``, once; a worker finds
them by PYTHONPATH. They are no dependencies of streamproc.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "sentences"
FOLDER = ROOT / "build" / "sentences"
INSTALL_S = 600


class UnavailableError(Exception):
    """The encoder's packages cannot be had; the message says why."""


def install() -> Path:
    """The folder with the encoder's packages, made where it is not there yet or is of other requirements.

    Raises:
        UnavailableError: they cannot be had.
    """
    requirements = EXAMPLE / "requirements.txt"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    marker = FOLDER / ".requirements"
    if marker.exists() and marker.read_text() == wanted:
        return FOLDER
    shutil.rmtree(FOLDER, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER)]
    try:
        subprocess.run(
            [*command, "--requirement", str(requirements)],
            check=True,
            capture_output=True,
            text=True,
            timeout=INSTALL_S,
        )
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"pip could not install {requirements}: {error.stderr.strip()[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"pip did not install {requirements} within {INSTALL_S} s") from error
    marker.write_text(wanted)
    return FOLDER


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process that loads the encoder. Raises UnavailableError."""
    paths = [str(install()), str(ROOT), environ.get("PYTHONPATH", "")]
    return {**environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def texts(count: int, seed: int, *, kind: str = "text") -> list[dict[str, str]]:
    """Records of the example, see its ``texts.py``."""
    spec = importlib.util.spec_from_file_location("sentences_texts", EXAMPLE / "texts.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Iterator[dict[str, str]] = module.texts(count, seed, kind=kind)
    return list(found)


def main() -> None:
    """Install, and encode two sentences."""
    code = (
        "from encoder import Encoder, load_tokenizer, model_folder\n"
        "encoder = Encoder(model_folder(), load_tokenizer(model_folder(), 256))\n"
        "one, other = encoder.encode(['A dog barks.', 'The hound makes noise.'])\n"
        "print(f'A dog barks / The hound makes noise: {float(one @ other):.3f}')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EXAMPLE, env=environment())


if __name__ == "__main__":
    main()
