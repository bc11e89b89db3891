"""The long run: ``make fuzz MINUTES=10 TARGET=wire SEED=1``, or ``python -m tests.fuzz.run``.

Runs one target after the other, each for its minutes in a process of its own (``guided``), and says every ten seconds
how far it is. Inputs that reach new code are kept in ``.fuzz/<target>/corpus``, from where the next run goes on. The
first input that fails, hangs or takes too much memory ends its target: it is in ``.fuzz/<target>/found``, and the
command to run it again is printed.

Exit codes: 0 nothing found, 1 something found, 2 atheris is not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz.targets import NAMES, target

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".fuzz"
PROGRESS_S = 10.0
INPUT_LIMIT_S = 10
INPUT_LIMIT_BYTES = 1_024
MEMORY_LIMIT_MB = 2_048
_STATUS = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/")
_FOUND = re.compile(r"Test unit written to (\S+)")


@dataclass
class Summary:
    """What a run of one target amounts to; ``coverage`` counts edges of the instrumented code."""

    target: str
    seed: int
    seconds: float = 0.0
    executions: int = 0
    executions_per_s: float = 0.0
    coverage: int = 0
    corpus: int = 0
    corpus_new: int = 0
    found: str | None = None
    replay: str | None = None

    def read(self, line: str) -> None:
        """Take a line of libFuzzer's."""
        status = _STATUS.match(line)
        if status is not None:
            self.executions, self.coverage, _, self.corpus = (int(number) for number in status.groups())
        elif line.startswith("stat::number_of_executed_units:"):
            self.executions = int(line.rpartition(":")[2])
        elif (found := _FOUND.search(line)) is not None:
            path = Path(found[1])
            self.found = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
            self.replay = f"python -m tests.fuzz.run --target {self.target} --input {self.found}"

    def __str__(self) -> str:
        return (
            f"{self.target:<9} {self.seconds:4.0f} s  {self.executions:>9,} executions  "
            f"{self.executions_per_s:>6,.0f}/s  coverage {self.coverage:,}  corpus {self.corpus:,}"
            f" ({self.corpus_new:+,})"
        )


def run(name: str, seconds: float, seed: int) -> tuple[Summary, list[str]]:
    """Fuzz one target for so long; the summary, and libFuzzer's last lines."""
    corpus, found = FOLDER / name / "corpus", FOLDER / name / "found"
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    for data in target(name).seeds:
        (corpus / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    before = len(list(corpus.iterdir()))
    command = [
        *(sys.executable, "-m", "tests.fuzz.guided", name),
        *(f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}", f"-timeout={INPUT_LIMIT_S}"),
        *(f"-max_len={INPUT_LIMIT_BYTES}", "-len_control=0", f"-rss_limit_mb={MEMORY_LIMIT_MB}"),
        *("-print_final_stats=1", f"-artifact_prefix={found}/", str(corpus)),
    ]
    summary = Summary(name, seed)
    last: deque[str] = deque(maxlen=80)
    begun = told = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        try:
            for line in process.stderr or ():
                summary.read(line)
                last.append(line.rstrip("\n"))
                now = time.monotonic()
                if now - told >= PROGRESS_S:
                    told = now
                    _measure(summary, now - begun, corpus, before)
                    print(summary, flush=True)
        except BaseException:
            process.kill()
            raise
    _measure(summary, time.monotonic() - begun, corpus, before)
    if process.returncode and summary.found is None:
        summary.found = f"the process ended with code {process.returncode}"
    return summary, list(last)


def _measure(summary: Summary, seconds: float, corpus: Path, before: int) -> None:
    summary.seconds = round(seconds, 1)
    summary.executions_per_s = round(summary.executions / seconds, 1)
    summary.corpus_new = len(list(corpus.iterdir())) - before


def replay(name: str, path: Path) -> int:
    """Run one saved input; its traceback is the finding."""
    begun = time.monotonic()
    target(name).check(path.read_bytes())
    print(f"{name}: {path} passes, in {time.monotonic() - begun:.3f} s")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description="Fuzz streamproc.")
    parser.add_argument("--target", choices=NAMES, help="this one only")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--seed", type=int, help="of libFuzzer; printed, and taken from the clock by default")
    parser.add_argument("--input", type=Path, help="run this saved input instead; needs --target")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on standard output, at the end")
    options = parser.parse_args(arguments)
    if options.input is not None:
        if options.target is None:
            parser.error("--input needs --target")
        return replay(options.target, options.input)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: make fuzz installs it, or pip install --group fuzz", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by which the fuzzing process is ended
    seed = options.seed if options.seed is not None else int(time.time())
    summaries = []
    for name in [options.target] if options.target else NAMES:
        print(f"{name}: {options.minutes:g} minutes, seed {seed}", flush=True)
        summary, last = run(name, options.minutes * 60, seed)
        summaries.append(summary)
        print(summary)
        if summary.found is not None:
            print("\n".join(last))
            print(f"{name}: FOUND {summary.found}\n  again: {summary.replay}")
    if options.json:
        print(json.dumps([asdict(summary) for summary in summaries], indent=2))
    return 1 if any(summary.found for summary in summaries) else 0


if __name__ == "__main__":
    sys.exit(main())
