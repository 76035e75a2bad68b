"""A real headless Chromium for the tests of pages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import require_debian
from playwright.sync_api import BrowserContext, expect, sync_playwright

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

expect.set_options(timeout=30_000)  # Playwright's own five seconds are short where a model shares two cores with a browser


@contextmanager
def open_browser(profile: Path) -> Iterator[BrowserContext]:
    """Open a browser that keeps all it writes in `profile`; skips the test where there is none."""
    chromium = require_debian("chromium", "chromium")
    with sync_playwright() as playwright:
        environment = {
            **os.environ,
            "HOME": str(profile),
            "XDG_CACHE_HOME": str(profile / "cache"),
            "XDG_CONFIG_HOME": str(profile / "config"),
        }
        context = playwright.chromium.launch_persistent_context(
            profile / "profile", executable_path=chromium, args=ARGUMENTS, env=environment, viewport={"width": 1280, "height": 900}
        )
        yield context
        context.close()
