"""A real Chromium for the tests of pages, driven by Playwright.

Playwright's own download of a browser is not asked for: Debian's package does as well, and so does any other Chromium.
Where there is none the test is skipped, and says how to get one; with STREAMPROC_REQUIRE_BROWSER=1 it fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What a browser would like to tell its maker at its start.
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


def chromium_path() -> str:
    """Where Chromium is."""
    named = os.environ.get("STREAMPROC_TEST_BROWSER")
    if named is not None and shutil.which(named) is None:
        pytest.fail(f"STREAMPROC_TEST_BROWSER is {named!r}, where no program is.", pytrace=False)
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is not None:
        return found
    reason = (
        "NO BROWSER, so that no page was looked at: `make browser` installs Debian's Chromium, or "
        "STREAMPROC_TEST_BROWSER names one that is elsewhere"
    )
    if os.environ.get("STREAMPROC_REQUIRE_BROWSER") == "1":
        pytest.fail(f"STREAMPROC_REQUIRE_BROWSER=1, and there is {reason}", pytrace=False)
    pytest.skip(reason)


@contextlib.asynccontextmanager
async def a_browser() -> AsyncIterator[Browser]:
    """Chromium, closed at the end of the block."""
    path = chromium_path()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=[*QUIET])
        try:
            yield browser
        finally:
            await browser.close()


@contextlib.asynccontextmanager
async def a_context(browser: Browser, **options: Any) -> AsyncIterator[tuple[BrowserContext, list[str]]]:
    """A window of its own, with what went wrong in its pages: errors, refusals of the policy, strange requests."""
    context = await browser.new_context(**options)
    wrong: list[str] = []

    def said(message: ConsoleMessage) -> None:
        # A request that was answered with an error, or by nobody, is said by the browser, and is no fault of the page.
        if message.type == "error" and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    def watch(page: Page) -> None:
        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(str(error)))

    context.on("page", watch)
    try:
        yield context, wrong
    finally:
        await context.close()
