"""`streamproc run` as it runs in production, against a broker."""

import json
import subprocess
import sys

STREAMPROC = [sys.executable, "-m", "streamproc"]


def test_texts_go_in_and_scores_come_out(streamproc_environ: dict[str, str]) -> None:
    texts = '{"text": "good", "user": "ann"}\n{"text": "bad", "user": "bob"}\n'
    read = [*STREAMPROC, "consume", "sentiment.text.results", "--follow", "-n", "2", "--timeout", "60"]
    with subprocess.Popen([*STREAMPROC, "run"], env=streamproc_environ) as service:
        try:
            write = [*STREAMPROC, "produce", "sentiment.text", "--key", "user"]
            subprocess.run(write, env=streamproc_environ, input=texts, text=True, check=True)
            found = subprocess.run(read, env=streamproc_environ, stdout=subprocess.PIPE, text=True, check=True)
        finally:
            service.terminate()
    scores = {line["result"]["text"]: line["result"]["score"] for line in map(json.loads, found.stdout.splitlines())}
    assert scores == {"good": 1.0, "bad": -1.0}
    assert service.returncode == 0
