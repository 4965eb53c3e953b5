"""A real browser for tests of pages: Debian's chromium, without a window."""

import shutil
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(scope="module")
def open_page() -> Iterator[Callable]:
    """open_page(url, **options of playwright's new_page) -> a page, whose `errors` collects what
    its console reports as an error."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on PATH (Debian's package)")
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright().start()
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    browser = playwright.chromium.launch(executable_path=chromium, args=arguments)

    def open_page(url: str, **options):
        page = browser.new_page(**options)
        page.errors = []
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    browser.close()
    playwright.stop()
