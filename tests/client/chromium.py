"""A real browser for the tests and the pictures: Chromium or Chrome as installed, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def why_not() -> str | None:
    """Why there is none; None if there is one."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "needs Playwright (the extra `dev`)"
    return None if found() else "needs Chromium or Chrome (Debian: apt install chromium)"


def found() -> str | None:
    """Where it is."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """Headless. Its own services are off, so that what it asks for is what the page asks for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found(), args=["--disable-dev-shm-usage"])
        try:
            yield launched
        finally:
            launched.close()


class Notes:
    """What a page asked for from elsewhere, and what its scripts complained of."""

    def __init__(self, page: Page, home: str) -> None:
        self.elsewhere: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self._asked(request.url, home))
        page.on("console", lambda message: self._said(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _asked(self, url: str, home: str) -> None:
        if not url.startswith((home, "data:", "blob:")):
            self.elsewhere.append(url)

    def _said(self, kind: str, text: str) -> None:
        if kind == "error":
            self.complaints.append(text)


def opened(launched: Browser, url: str, **context: Any) -> tuple[Page, Notes]:
    """The page, once it has found its API."""
    page = launched.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}).new_page()
    notes = Notes(page, url)
    page.goto(url)
    page.get_by_label("Prompt").wait_for()
    page.locator(".fx-pill:not(.fx-unknown)").wait_for()
    return page, notes
