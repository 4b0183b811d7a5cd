"""A page in a real Chromium, with all that it complains of and asks for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # what the system may call it
LOCAL = ("file:", "data:", "blob:", "about:")


class Tab:
    """A fresh page of a browser, and what has happened in it.

    page: Playwright's: `tab.page.goto(path.as_uri())`, `tab.page.emulate_media(color_scheme="dark")`.
    errors: errors and warnings of the console, exceptions that nothing caught, and requests that came to nothing.
    requests: every URL that was asked for, the opened ones among them.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", self._failed)

    @property
    def network(self) -> list[str]:
        """Of `requests`, those that left for the network."""
        return [url for url in self.requests if not url.startswith(LOCAL)]

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"console: {message.text}")

    def _failed(self, request: Request) -> None:
        self.errors.append(f"{request.url}: {request.failure}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, headless; skips the test where there is none."""
    found = [path for path in map(shutil.which, CHROMIUM) if path]
    if not found:
        pytest.skip(f"no Chromium is installed (none of {', '.join(CHROMIUM)}): apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: it drives Chromium")
    with api.sync_playwright() as playwright:
        # Its sandbox does not start as root, or in a container; what is opened here are our own pages.
        browser = playwright.chromium.launch(executable_path=found[0], chromium_sandbox=False)
        try:
            yield browser
        finally:
            browser.close()
