"""A page in Chromium, with all that went wrong in it and all that it asked for."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page

SCREENSHOTS = Path(__file__).parents[1] / "runs" / "screenshots"


class Opened:
    """A page as opened. `errors`: console, exceptions, dialogs. `requests`: every URL asked for."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        page.on("request", lambda request: self.requests.append(request.url))
        page.set_default_timeout(5000)
        page.goto(url)

    def screenshot(self, name: str) -> None:
        """The whole page, into runs/screenshots."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
