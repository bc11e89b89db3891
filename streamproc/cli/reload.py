"""``streamproc reload``: a new version of backend and settings into a running processor, without a restart."""

from __future__ import annotations

import contextlib

import typer
from rich.markup import escape

from streamproc.cli.sidecar import UrlOption, ask_sidecar, sidecar_url
from streamproc.cli.terminal import ConfigOption, JsonOption, print_json, say, stderr
from streamproc.errors import ReloadRefusedError, SidecarError

app = typer.Typer()

_UNPROCESSABLE = 422


@app.command(epilog="Example: streamproc reload -c streamproc.yaml")
def reload(*, url: UrlOption = None, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Have the running processor go on with what its files say now, and wait until it does.

    It reads its settings file, the declared topics and the backend's code again, in new workers beside those that work.
    Once all are ready they take over: no rebalance, no record lost. A version that does not become ready is refused,
    with exit code 1, and everything goes on as before. The processor takes this from its own machine only. SIGHUP does
    the same.
    """
    address = sidecar_url(url, config)
    try:
        with contextlib.ExitStack() as spinner:
            if stderr.is_terminal:
                spinner.enter_context(stderr.status(escape(f"new workers are starting at {address}")))
            done = ask_sidecar(address, "POST", "/reload", timeout_s=None)
    except SidecarError as error:
        if error.status == _UNPROCESSABLE:
            raise ReloadRefusedError(f"refused, and the version before goes on: {error.detail}") from error
        raise
    if as_json:
        print_json(done)
        return
    version = f"backend version {done['backend_version']}, " if done["backend_version"] else ""
    say(f"reloaded in {done['took_s']:.1f} s: {version}generation {done['generation']}")
