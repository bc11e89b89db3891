"""The dashboard in a real Chromium, shown statuses that a test makes: the page and its policy are the sidecar's own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from playwright.async_api import Locator, Page, Route, expect

from streamproc.observe.dashboard import dashboard_routes
from streamproc.observe.status import (
    EXAMPLE,
    BatchTotals,
    CircuitStatus,
    CostStatus,
    FailureStatus,
    MeasurerStatus,
    Observed,
    PartitionStatus,
    ProcessorStatus,
    RecordCounts,
    ReloadStatus,
    RequestStatus,
    TargetStatus,
    TaskStatus,
    WindowStatus,
    WorkerStatus,
)
from tests.support.browser import a_browser, a_context

SITE = "http://sidecar.test"
HOSTILE = '<img src=x onerror="window.taken=1"></td><script>window.taken=1</script>&amp;\'"`${1}'
OPEN = CircuitStatus(state="open", reason="100 of the last 100 records failed", bad=100, decided=100, openings=1)


class Site:
    """A sidecar that is asked by a browser without a network, and answers what a test says."""

    def __init__(self, *, token_set: bool = False) -> None:
        self.status: ProcessorStatus | None = EXAMPLE
        """None: nobody answers."""
        self.code = 200
        self.token: str | None = None
        self.asked = 0
        self.changes: list[str] = []
        self.strange: list[str] = []
        self._app = FastAPI()
        self._app.include_router(dashboard_routes(token_set=token_set))

    async def answer(self, route: Route) -> None:
        url, request = urlsplit(route.request.url), route.request
        if f"{url.scheme}://{url.netloc}" != SITE:
            self.strange.append(request.url)
            await route.abort()
        elif url.path == "/":
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url=SITE) as client:
                page = await client.get("/")
            await route.fulfill(status=200, headers=dict(page.headers), body=page.content)
        elif url.path == "/status":
            self.asked += 1
            if self.status is None:
                await route.abort("connectionrefused")
            elif self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
                await route.fulfill(status=401, json={"detail": "send the token"})
            else:
                body = self.status.model_dump_json(by_alias=True)
                await route.fulfill(status=self.code, content_type="application/json", body=body)
        elif request.method == "POST":
            self.changes.append(f"{url.path} {request.headers.get('authorization')} {request.headers['content-type']}")
            await route.fulfill(status=409, json={"detail": "the processor is stopping"})
        else:
            self.strange.append(request.url)
            await route.abort()


@contextlib.asynccontextmanager
async def looking_at(site: Site, **options: Any) -> AsyncIterator[Page]:
    """The page in a browser; what its policy refuses, or asks of others, fails the test."""
    async with a_browser() as browser, a_context(browser, **options) as (context, wrong):
        await context.route("**/*", site.answer)
        page = await context.new_page()
        await page.goto(f"{SITE}/")
        yield page
        assert wrong == []
        assert site.strange == []


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def row(page: Page, name: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name, exact=True))


async def shows(page: Page, name: str, *cells: str) -> None:
    """Whether the row of this name has these cells, from its second one on."""
    await expect(row(page, name).get_by_role("cell")).to_have_text(list(cells))


def task_of(**fields: Any) -> TaskStatus:
    return EXAMPLE.tasks["text"].model_copy(update=fields)


def status_of(task: TaskStatus | None = None, **fields: Any) -> ProcessorStatus:
    tasks = {"text": task or EXAMPLE.tasks["text"]}
    return EXAMPLE.model_copy(update={"tasks": tasks, **fields})


def test_everything_of_a_status_is_on_the_page_with_units() -> None:
    async def test() -> None:
        site = Site()
        begun = task_of(
            counts=RecordCounts(taken=1_000, results=900, dead=7, dropped=3, retried=40),
            batches=BatchTotals(fill=Observed(count=10, sum=5), steps_ms={"execute": Observed(count=10, sum=120)}),
            measuring=5,
            target=TargetStatus(latency_ms=50, within=97, beyond=3),
            requests=RequestStatus(waiting=2, waiting_bytes=2_048, counts={"ok": 201, "failed": 1, "left": 0}),
            window=WindowStatus(size=12, age_ms=3.1),
        )
        site.status = status_of(begun, measurer=MeasurerStatus(pid=99, state="ready", restarts=2))
        async with looking_at(site) as page:
            await expect(page.get_by_role("heading", level=1)).to_have_text("sentiment")
            await expect(page.locator("#state")).to_have_text("ready")
            await expect(page.locator("#about")).to_have_text(
                "streamproc 0.1.0, up for 1 min 1 s, generation 2, backend version 2024-05"
            )
            await expect(page.locator("#lag-records")).to_have_text("130 records")
            await expect(page.locator("#lag-seconds")).to_have_text("50 ms")
            await expect(page.locator("#in-flight")).to_have_text("128 records")
            await expect(page.locator("#rate-out")).to_have_text("unknown")
            p50, p99 = (page.locator(f"[data-part=latency-{it}]") for it in ("p50", "p99"))
            await expect(p50).to_have_text("13.3 ms")
            await expect(p99).to_have_text("19.8 ms")
            busy = "64 records of text, for 8.3 ms"
            await shows(page, "worker 0", "busy", busy, "4711", "66", "212 MiB", "0")
            await shows(page, "measuring", "ready", "lengths of records", "99", "none", "unknown", "2")
            await shows(page, "sentiment.text 0", "130", "50 ms", "128", "4096", "reading")
            where = "(sentiment.text, partition 0, offset 17)"
            said = f"{begun.failures[0].message} {where}"
            await shows(page, "invalid: JSONDecodeError in decode", "1", "0", said)
            await shows(page, "fill", "none", "50 %")
            await shows(page, "execute", "none", "12 ms", "100 %")
            text = page.get_by_role("region", name="Task text", exact=True)
            await expect(text).to_contain_text("7 dead letters and 3 dropped of 1,000 records read; 900 results")
            await expect(text).to_contain_text("1 of 4,096 records failed lately")
            await expect(text).to_contain_text("12 records, 3.1 ms; 5 not measured yet")
            await expect(text).to_contain_text("Latency to keep: 50 ms; 97 % of the records kept it.")
            predictions = "Predictions over HTTP: 201 ok, 1 failed; 2 requests waiting, with 2 KiB."
            await expect(text).to_contain_text(predictions)
            await expect(text).to_contain_text("Changed by streamproc circuit open text")
            await expect(page.get_by_role("button")).to_have_count(0)

            later = begun.model_copy(
                update={
                    "counts": RecordCounts(taken=7_000, results=6_900, dead=7, dropped=3, retried=40),
                    "batches": BatchTotals(
                        fill=Observed(count=20, sum=14), steps_ms={"execute": Observed(count=20, sum=1_120.5)}
                    ),
                    "latency_ms": begun.latency_ms.model_copy(
                        update={
                            "count": begun.latency_ms.count + 100,
                            "buckets": [*begun.latency_ms.buckets, (20.0, 30.0, 50), (600_000.0, None, 50)],
                        }
                    ),
                }
            )
            site.status = status_of(later, uptime_s=EXAMPLE.uptime_s + 5)
            await expect(page.locator("#rate-out")).to_have_text("1,200/s")
            await expect(p50).to_have_text("30 ms")
            await expect(p99).to_have_text("10 min 0 s")
            await shows(page, "fill", "90 %", "70 %")
            await shows(page, "execute", "100 ms", "56 ms", "100 %")
            chart = page.get_by_role("img", name="Results: 1,200/s now, 1,200/s at most in the last 5 s")
            assert (await chart.locator("path").get_attribute("d") or "").startswith("M300")

    run(test)


def test_names_and_messages_stay_text_whatever_is_in_them() -> None:
    async def test() -> None:
        site = Site()
        failure = FailureStatus(
            cause="exception",
            stage="execute",
            kind=HOSTILE,
            message=HOSTILE,
            topic=HOSTILE,
            partition=0,
            offset=0,
            dead=1,
        )
        hostile = task_of(
            topics=[HOSTILE],
            group=HOSTILE,
            reason=HOSTILE,
            circuit=OPEN.model_copy(update={"reason": HOSTILE}),
            failures=[failure],
            partitions=[PartitionStatus(topic=HOSTILE, partition=3, epoch=0)],
        )
        site.status = EXAMPLE.model_copy(
            update={"name": HOSTILE, "version": HOSTILE, "tasks": {HOSTILE: hostile}, "not_ready": [HOSTILE]}
        )
        async with looking_at(site) as page:
            await expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE)
            await expect(page.locator("#reasons-list li")).to_have_text([HOSTILE])
            await shows(page, f"{HOSTILE} 3", "unknown", "unknown", "0", "unknown", "reading")
            shown = f"{HOSTILE} ({HOSTILE}, partition 0, offset 0)"
            await shows(page, f"exception: {HOSTILE} in execute", "1", "0", shown)
            assert await page.locator("img, main script").count() == 0
            assert await page.evaluate("window.taken") is None

    run(test)


def test_a_lost_connection_is_said_asked_for_ever_less_often_and_over_once_somebody_answers() -> None:
    async def test() -> None:
        site = Site()
        async with a_browser() as browser, a_context(browser) as (context, wrong):
            await context.route("**/*", site.answer)
            page = await context.new_page()
            await page.clock.install()
            await page.goto(f"{SITE}/")
            await expect(page.locator("#state")).to_have_text("ready")
            site.status = None
            before = site.asked
            await page.clock.run_for(1_100)
            await expect(page.get_by_role("heading", name="Connection lost")).to_be_visible()
            await expect(page.locator("#state")).to_have_text("connection lost")
            await expect(page.get_by_role("status").first).to_have_text("Connection lost. Nobody answers.")
            await expect(page.locator("#lost-next")).to_contain_text("Next try in")
            for _ in range(30):
                await page.clock.run_for(2_000)
            # Every second it would have been 60 times; 1, 2, 4, 8, 15 … s apart, give or take a fifth, it is 5 to 9.
            assert 5 <= site.asked - before <= 9
            await expect(page.locator("#lost-age")).to_contain_text("What is shown is 1 min")
            site.status, site.code = EXAMPLE, 500
            await page.get_by_role("button", name="Try now").click()
            await expect(page.locator("#lost-why")).to_have_text("The processor answers with 500.")
            site.code = 200
            await page.get_by_role("button", name="Try now").click()
            await expect(page.locator("#lost")).to_be_hidden()
            await expect(page.locator("#state")).to_have_text("ready")
            await expect(page.locator("#events li").first).to_contain_text("Connected again.")
            assert wrong == []

    run(test)


def test_changes_of_state_are_said_once_and_politely() -> None:
    async def test() -> None:
        site = Site()
        async with looking_at(site) as page:
            events = page.locator("#events li .said")
            await expect(page.locator("#state")).to_have_text("ready")
            await expect(events).to_have_count(0)
            reasons = ["task text: the circuit is open: 100 of the last 100 records failed"]
            worker = EXAMPLE.workers[0].model_copy(update={"restarts": 1, "pid": 4712, "state": "starting"})
            site.status = status_of(task_of(circuit=OPEN), workers=[worker], not_ready=reasons, uptime_s=70)
            said = [
                "The processor is not ready now; it was ready.",
                "Worker 0, process 4711, is replaced.",
                "The circuit of task text opened: 100 of the last 100 records failed.",
            ]
            await expect(events).to_have_text(said)
            await expect(page.get_by_role("status").first).to_have_text(said[0])
            await expect(page.locator("#reasons-list li")).to_have_text(reasons)
            await expect(page.get_by_text("open: the task is paused")).to_be_visible()
            asked = site.asked
            await expect(page.locator("#state")).to_have_text("not ready")
            while site.asked < asked + 2:
                await page.wait_for_event("response")
            await expect(events).to_have_text(said)
            ready = worker.model_copy(update={"state": "ready"})
            site.status = status_of(workers=[ready], uptime_s=80)
            new = [
                "The processor is ready now; it was not ready.",
                "Worker 0 is ready, as process 4712.",
                "The circuit of task text closed.",
            ]
            await expect(events).to_have_text([*new, *said])
            started = EXAMPLE.started_at.replace(year=2025)
            site.status = status_of(started_at=started, uptime_s=1)
            await expect(events.first).to_have_text("The processor was started anew.")

    run(test)


def test_a_token_is_asked_for_kept_in_the_tab_and_asked_for_again_when_it_is_refused() -> None:
    async def test() -> None:
        site = Site(token_set=True)
        site.token = "right"  # noqa: S105 - no password of anybody
        async with looking_at(site) as page:
            field = page.get_by_label("The processor asks for its token.")
            await expect(field).to_be_focused()
            await expect(page.locator("#shown")).to_be_hidden()
            await field.fill("wrong")
            await field.press("Enter")
            again = page.get_by_label("The token was refused. Another one?")
            await again.fill("right")
            await page.get_by_role("button", name="Use it").click()
            await expect(page.locator("#state")).to_have_text("ready")
            await expect(page.locator("#ask")).to_be_hidden()
            await page.reload()
            await expect(page.locator("#state")).to_have_text("ready")
            assert await page.evaluate("Object.keys(localStorage).length") == 0
            assert await page.evaluate("document.cookie") == ""

            questions: list[str] = []

            async def agree(dialog: Any) -> None:
                questions.append(dialog.message)
                await dialog.accept()

            page.on("dialog", agree)
            await page.get_by_role("button", name="Pause text").click()
            await expect(page.get_by_text("Refused: the processor is stopping.")).to_be_visible()
            assert questions == ["Pause task text? It takes nothing more until its circuit is closed."]
            assert site.changes == ["/tasks/text/circuit/open Bearer right application/json"]

    run(test)


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const channels = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = channels(colour).slice(0, 3).map((it) => it / 255)
      .map((it) => it <= .04045 ? it / 12.92 : ((it + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (node) => {
    for (let it = node; it; it = it.parentElement) {
      const colour = getComputedStyle(it).backgroundColor;
      if (channels(colour)[3] === 255) return colour;
    }
    return "rgb(255, 0, 255)";
  };
  const poor = [];
  let looked = 0;
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((it) => it.nodeType === 3 && it.data.trim());
    if (!text || !node.checkVisibility()) continue;
    looked += 1;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.push(`${node.className} ${node.textContent.slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return [looked, poor];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_on_a_telephone_in_light_and_dark(scheme: str) -> None:
    async def test() -> None:
        site = Site(token_set=True)
        worst = task_of(state="stopped", circuit=OPEN, topics=["a" * 120], reason="back-pressure")
        starting = WorkerStatus(index=1, state="starting")
        tasks = {"text": worst, "b" * 60: task_of(state="draining")}
        site.status = status_of(not_live=["c" * 200], workers=[*EXAMPLE.workers, starting]).model_copy(
            update={"tasks": tasks}
        )
        options = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "reduced_motion": "reduce"}
        async with looking_at(site, **options) as page:
            await expect(page.locator("#state")).to_have_text("not alive")
            site.status = None
            await expect(page.locator("#lost")).to_be_visible()
            looked, poor = await page.evaluate(CONTRAST)
            assert looked > 100
            assert poor == []
            assert await page.evaluate("document.documentElement.scrollWidth") <= 360
            small = """() => [...document.querySelectorAll("button, input")].filter((it) => it.checkVisibility())
                .map((it) => it.getBoundingClientRect()).filter((it) => it.height < 24 || it.width < 24).length"""
            assert await page.evaluate(small) == 0
            moving = '() => getComputedStyle(document.querySelector(".bar")).transitionDuration'
            assert await page.evaluate(moving) == "0s"
            # What is wider than the window can be reached by keyboard, and says what it is.
            regions = page.locator(".wide")
            for index in range(await regions.count()):
                region = regions.nth(index)
                assert await region.get_attribute("tabindex") == "0"
                assert await region.get_attribute("aria-label") or await region.get_attribute("aria-labelledby")

    run(test)


def test_what_batches_are_predicted_to_cost_and_how_reloads_ended_are_on_the_page() -> None:
    async def test() -> None:
        site = Site()
        cost = CostStatus(
            trusted=True,
            alpha_ms=4.04,
            beta_ms=0.25,
            gamma_ms=0.164,
            delta_ms=0.0005,
            a_bytes=3 * 2**20,
            b_bytes=2048,
            c_bytes=512,
            d_bytes=0,
            kappa=1.25,
            estimate="estimates/text.json",
            memory_budget_mb=900,
            memory_budget_source="batch.memory_budget_mb",
            max_size=64,
            max_padded=8_192,
        )
        site.status = status_of(task_of(cost=cost))
        async with looking_at(site) as page:
            await shows(page, "time", "4.04\u00a0ms", "0.25\u00a0ms", "0.164\u00a0ms", "0.5\u00a0µs")
            await shows(page, "memory", "3\u00a0MiB", "2\u00a0KiB", "512\u00a0B", "0\u00a0B")
            table = page.locator("[data-part=cost-region]")
            await expect(table).to_contain_text("begun with estimates/text.json; memory is taken 1.25 times at present")
            await expect(page.locator("[data-part=target]")).to_have_text(
                "Memory to keep: 900\u00a0MiB a worker, by batch.memory_budget_mb. 64 records a batch at most, "
                "padded to 8,192 in all."
            )
            await expect(page.locator("#reload")).to_contain_text("Reloaded at ")
            refused = ReloadStatus(
                outcome="refused",
                reason="its worker 0 did not become ready",
                ended_at=EXAMPLE.started_at + timedelta(seconds=50),
                took_s=1.5,
                generation=2,
                backend_version="2024-05",
            )
            site.status = status_of(last_reload=refused, reloading=True)
            said = page.locator("#reload")
            await expect(said).to_contain_text("A reload is under way. A reload was refused at ")
            await expect(said).to_contain_text(
                "its worker 0 did not become ready. Generation 2 goes on, version 2024-05."
            )
            await expect(page.locator("#events")).to_contain_text("A reload was refused at ")
            await expect(table).to_be_hidden()

    run(test)
