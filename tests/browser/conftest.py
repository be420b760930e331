"""Pages in headless Chromium, cut off from every network; skipped, with the reason, without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browserkit import Opened
from playwright.sync_api import Browser, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


# for a module and no longer: while it lives, playwright's event loop runs in this thread
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("Chromium is not installed: apt-get install chromium fonts-dejavu-core")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """open_page(html, width=..., scheme=..., touch=...) -> Opened."""
    contexts = []

    def open_(
        html: str, *, width: int = 1280, scheme: Any = "light", touch: bool = False
    ) -> Opened:
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": 844},
            color_scheme=scheme,
            has_touch=touch,
            offline=True,
        )
        contexts.append(context)
        return Opened(context.new_page(), path.as_uri())

    yield open_
    for context in contexts:
        context.close()
