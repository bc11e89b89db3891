"""The pictures of the dashboard in docs/: `python -m tests.support.dashboard_pictures` takes them anew.

The digits application on an embedded broker, streamed to at a rate that swings; some records are no digits. For the
last picture the circuit is opened by hand. It takes two minutes, and needs a browser (`make browser`).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import tempfile
import time
from pathlib import Path

import httpx
import yaml
from playwright.async_api import Browser

from streamproc.broker.client import KafkaProducer
from streamproc.broker.embedded import EmbeddedBroker
from streamproc.demo.inference import sample_records
from tests.support.app import ROOT, App, create, kafka_settings
from tests.support.browser import a_browser, a_context

DOCS = ROOT / "docs"
PARTITIONS = 3
STREAMED_S = 100.0
RATE = 900


async def stream(bootstrap_servers: str, ends_at: float) -> None:
    """Digits at a rate that swings around ``RATE`` records a second, one in 200 of them no digit."""
    rng = random.Random(1)
    digits = [json.dumps(it).encode() for it in sample_records()]
    producer = KafkaProducer(kafka_settings(bootstrap_servers), client_id="pictures", max_batch_bytes=900_000)
    await producer.start()
    begun = time.monotonic()
    while (now := time.monotonic()) < ends_at:
        share = 1 + 0.5 * math.sin((now - begun) / 9) + rng.uniform(-0.1, 0.1)
        for partition in range(PARTITIONS):
            batch = producer.create_batch()
            for _ in range(round(RATE * share / PARTITIONS / 4)):
                wrong = rng.choice([b'{"id": 1, "pixels": [1, 2]}', b'{"id": 1, "pi'])
                value = wrong if rng.random() < 0.005 else rng.choice(digits)
                batch.append(timestamp=None, key=None, value=value, headers=[])
            await (await producer.send_batch(batch, "digits", partition))
        await asyncio.sleep(0.25)
    await producer.stop()


async def take(browser: Browser, app: App, bootstrap_servers: str) -> None:
    """Look on while records stream, and take the pictures."""
    wide = {"viewport": {"width": 1000, "height": 1040}}
    narrow = {"viewport": {"width": 360, "height": 900}, "device_scale_factor": 1.5}
    async with (
        a_context(browser, **wide, color_scheme="light") as (light, _),
        a_context(browser, **wide, color_scheme="dark") as (dark, _),
        a_context(browser, **narrow, color_scheme="light") as (phone, _),
    ):
        pages = [await context.new_page() for context in (light, dark, phone)]
        for page in pages:
            await page.goto(f"{app.url}/")
        await stream(bootstrap_servers, time.monotonic() + STREAMED_S)
        for page, name in ((pages[0], "light"), (pages[2], "phone")):
            await page.screenshot(path=DOCS / f"dashboard-{name}.png")
        headers = {"content-type": "application/json"}
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{app.url}/tasks/digits/circuit/open", headers=headers)
            answer.raise_for_status()
        await stream(bootstrap_servers, time.monotonic() + 8)
        await pages[1].get_by_text("open: the task is paused").wait_for()
        await pages[1].screenshot(path=DOCS / "dashboard-dark.png")


def main() -> None:
    """Start everything, take the pictures, stop everything."""
    settings = yaml.safe_load((ROOT / "examples" / "digits" / "streamproc.yaml").read_text(encoding="utf-8"))
    settings["pool"]["workers"] = 2
    settings["topics_dir"] = str(ROOT / "topics")
    settings.pop("http", None)

    async def go(app: App, bootstrap_servers: str) -> None:
        async with a_browser() as browser:
            await take(browser, app, bootstrap_servers)

    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker() as broker:
        settings["kafka"] = {"bootstrap_servers": broker.bootstrap_servers}
        create(
            broker.bootstrap_servers, {"digits": PARTITIONS, "digits.results": PARTITIONS, "digits.dead": PARTITIONS}
        )
        create(broker.bootstrap_servers, {"digits.metrics": 1})
        with App(Path(folder), settings) as app:
            app.until_ready()
            asyncio.run(go(app, broker.bootstrap_servers))
            app.terminate()


if __name__ == "__main__":
    main()
