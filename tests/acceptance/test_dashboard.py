"""The sidecar's pages in a real Chromium: what happens to a processor is found on the dashboard and in Swagger UI."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.async_api import Locator, Page, expect

from tests.support.app import ROOT, App, create, produce
from tests.support.browser import a_browser, a_context

TOKEN = "open sesame"  # noqa: S105 - of a test
SOON_MS = 20_000
"""Longer than a worker takes to start on a busy machine."""


def row(page: Page, name: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name, exact=True))


async def tried_out(page: Page, operation: str, body: str | None = None) -> Locator:
    """The answer that Swagger UI shows after *Try it out* and *Execute*: its status and its body."""
    block = page.locator(f"#operations-{operation}")
    if not await block.get_by_role("button", name="Execute").is_visible():
        await block.locator(".opblock-summary-control").click()
        await block.get_by_role("button", name="Try it out").click()
    if body is not None:
        await block.locator("textarea").fill(body)
    await block.get_by_role("button", name="Execute").click()
    return block.locator(".live-responses-table .response")


def test_streaming_records_failures_a_killed_worker_and_an_open_circuit_are_on_the_dashboard_and_in_swagger(
    embedded_broker: str, tmp_path: Path, topic_name: Callable[..., str]
) -> None:
    topic, mended = topic_name(), tmp_path / "mended"
    create(embedded_broker, {topic: 2, f"{topic}.results": 2, f"{topic}.dead": 2, f"{topic}.metrics": 1})
    limits = {"max_run": 100, "close_after_s": None}
    settings = {
        "name": topic,
        "kafka": {"bootstrap_servers": embedded_broker},
        "backend": {"path": "tests.support.backends:Scripted", "base_dir": str(ROOT)},
        "pool": {"workers": 2, "restart_backoff_ms": 10},
        "http": {"port": 0, "token": TOKEN},
        "tasks": {
            "main": {
                "input": {"topics": [topic]},
                "batch": {"max_size": 16, "max_wait_ms": 5},
                "on_error": {"retries": 0, "circuit": limits},
                "commit_interval_ms": 100,
            }
        },
    }

    async def send(count: int, partition: int = 0, **fields: Any) -> None:
        values: list[tuple[bytes | None, bytes | None]] = [
            (None, json.dumps({"id": index, **fields}).encode()) for index in range(count)
        ]
        await asyncio.to_thread(produce, embedded_broker, topic, {partition: values})

    async def story(app: App, page: Page, swagger: Page) -> None:
        seen = expect
        events, state = page.locator("#events .said"), page.locator("#state")
        await page.goto(f"{app.url}/")
        await seen(state).to_have_text("ready", timeout=SOON_MS)
        await seen(page.get_by_role("heading", level=1)).to_have_text(topic)

        # Records stream.
        for _ in range(3):
            await send(400, partition=0)
            await send(400, partition=1)
        counts = page.get_by_text(re.compile("dead letters and .* read; "))
        await seen(counts).to_contain_text("of 2,400 records read; 2,400 results", timeout=SOON_MS)
        most = re.compile(r"^Results: .* now, [1-9][\d,.]*/s at most in the last ")
        await seen(page.locator("#chart-rate-text")).to_have_text(most, timeout=SOON_MS)
        await seen(row(page, "execute").get_by_role("cell").nth(1)).to_have_text(re.compile(r"^[\d.]+\s(µs|ms|s)$"))
        for partition in range(2):
            cells = row(page, f"{topic} {partition}").get_by_role("cell")
            await seen(cells).to_have_text(["0", "0 s", "0", "1200", "reading"], timeout=SOON_MS)

        # Records fail.
        await send(3, do="raise")
        await asyncio.to_thread(produce, embedded_broker, topic, {1: [(None, b"{no JSON")]})
        raised = row(page, "exception: ValueError in execute").get_by_role("cell")
        await seen(raised.first).to_have_text("3", timeout=SOON_MS)
        await seen(raised.last).to_contain_text("is at fault")
        decoded = page.get_by_role("row").filter(has_text=re.compile("^invalid: .* in decode"))
        await seen(decoded).to_contain_text(f"({topic}, partition 1, offset 1200)", timeout=SOON_MS)
        await seen(page.locator("#dead")).to_have_text("4")

        # A worker is killed: the one whose process the page names.
        worker = row(page, "worker 1").get_by_role("cell")
        pid = int(await worker.nth(2).inner_text())
        assert pid in await asyncio.to_thread(app.worker_pids)
        os.kill(pid, signal.SIGKILL)
        await seen(worker.last).to_have_text("1", timeout=SOON_MS)
        await seen(events.filter(has_text=f"Worker 1, process {pid}, is replaced.")).to_have_count(1)
        await seen(worker.first).to_have_text("idle", timeout=SOON_MS)
        await seen(worker.nth(2)).not_to_have_text(str(pid))
        await seen(state).to_have_text("ready", timeout=SOON_MS)

        # The circuit opens by itself, and is closed with the token, once the model is mended.
        await send(300, do="fail", until=str(mended))
        await seen(page.get_by_text("open: the task is paused")).to_be_visible(timeout=SOON_MS)
        await seen(page.get_by_role("listitem").filter(has_text="the circuit is open")).to_be_visible()
        await seen(events.filter(has_text="The circuit of task main opened: 100 records in a row")).to_have_count(1)
        await seen(state).to_have_text("not ready")

        # Swagger's answers say the same; there a task is asked for a prediction too, refused while its circuit is open.
        await swagger.goto(f"{app.url}/docs")
        status = await tried_out(swagger, "observation-status")
        for part in ('"state": "open"', '"restarts": 1', '"kind": "InvalidJSON"'):
            await seen(status).to_contain_text(part, timeout=SOON_MS)
        await swagger.get_by_role("button", name="Authorize").click()
        await swagger.locator(".auth-container input").fill(TOKEN)
        await swagger.get_by_role("button", name="Apply credentials").click()
        await swagger.get_by_role("button", name="Close", exact=True).click()
        answer = await tried_out(swagger, "predict-predict_main", '{"id": 7}')
        await seen(answer.locator(".response-col_status")).to_contain_text("503", timeout=SOON_MS)

        mended.touch()
        await page.get_by_role("button", name="Close the circuit of main").click()
        await page.get_by_label("To change a circuit, the processor asks for its token.").fill(TOKEN)
        await page.get_by_role("button", name="Use it").click()
        await seen(events.filter(has_text="The circuit of task main closed.")).to_have_count(1, timeout=SOON_MS)
        await seen(state).to_have_text("ready", timeout=SOON_MS)
        await seen(counts).to_contain_text("of 2,704 records read", timeout=SOON_MS)

        answer = await tried_out(swagger, "predict-predict_main", '{"id": 7}')
        await seen(answer.locator(".response-col_status")).to_contain_text("200", timeout=SOON_MS)
        await seen(answer).to_contain_text('"id": 7')

        # The processor ends.
        assert await asyncio.to_thread(app.terminate) == 0
        await seen(page.get_by_role("heading", name="Connection lost")).to_be_visible(timeout=SOON_MS)

    async def go(app: App) -> None:
        own = f"{app.url}/"
        async with a_browser() as browser, a_context(browser) as (context, wrong):
            asked: list[str] = []
            context.on("request", lambda request: asked.append(request.url))
            await story(app, await context.new_page(), await context.new_page())
            assert wrong == []
            assert {it for it in asked if not it.startswith(own)} == set(), "nothing leaves the machine"

    with App(tmp_path, settings) as app:
        app.until_ready()
        asyncio.run(asyncio.wait_for(go(app), 180))
        assert "GET /status" not in app.log(), "a page that is open does not fill the log"
