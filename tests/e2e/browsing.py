"""A real Chromium, and all that a page asks for and says meanwhile."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(__file__).parent / "browser" / "node_modules" / "axe-core" / "axe.min.js"
SCREENSHOTS = os.environ.get("STILLHOUSE_SCREENSHOTS")  # a folder, for `make screenshots`
DESKTOP = {"width": 1100, "height": 720}
WAIT_MS = 120_000
MOST_TABS = 200
SCHEMES = ("light", "dark")


@contextmanager
def browsing() -> "Iterator[Browser]":
    """Yields a browser without a window."""
    from playwright.sync_api import sync_playwright

    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=root)
        yield browser
        browser.close()


@contextmanager
def visiting(browser: "Browser", url: str, **options: Any) -> "Iterator[Page]":
    """Yields a page on that server. It must ask no other one, raise no error, and leave no secret in an address."""
    context = browser.new_context(**{"viewport": DESKTOP, "accept_downloads": True} | options)
    context.set_default_timeout(WAIT_MS)
    asked: list[str] = []
    wrong: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("response", lambda answer: wrong.append(answer.url) if answer.status >= 500 else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(url)
    yield page
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
    assert [one for one in asked if not one.startswith((f"{origin}/", f"blob:{origin}/"))] == []
    assert [one for one in asked if "sk_" in one] == []
    assert "sk_" not in page.url
    assert wrong == []
    context.close()


def enter(page: "Page", key: str) -> None:
    """Gives the page its key, as a user types it."""
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Open").click()
    heading(page, "Jobs")


def heading(page: "Page", text: str) -> None:
    page.get_by_role("heading", level=1, name=text, exact=True).wait_for()


def view(page: "Page", name: str) -> None:
    """Opens a view by a click."""
    page.get_by_role("navigation").get_by_role("link", name=name, exact=True).click()
    heading(page, name)


def check_access(page: "Page", place: str) -> None:
    """Fails with what axe finds wrong, in both colour schemes, or where the page is wider than a small screen."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE.read_text(encoding="utf-8"))
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate("axe.run()")
        assert found["passes"], place
        shown = [
            (one["id"], [(node["html"][:200], node["failureSummary"]) for node in one["nodes"][:3]])
            for one in found["violations"]
        ]
        assert shown == [], f"{place}, {scheme}: {shown}"
    assert "[object " not in page.inner_text("main"), place
    page.set_viewport_size({"width": 320, "height": 720})
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 320, place
    page.set_viewport_size(DESKTOP)
    page.emulate_media(color_scheme="light")


def shoot(page: "Page", name: str) -> None:
    """Takes a picture for the documentation in each colour scheme, if that is wanted."""
    for scheme in SCHEMES if SCREENSHOTS else ():
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{scheme}.png")
    page.emulate_media(color_scheme="light")


def tab_to(page: "Page", target: "Locator") -> None:
    """Moves the focus by the Tab key alone, and fails if that is nowhere to be seen."""
    element = target.element_handle()
    for _ in range(MOST_TABS):
        page.keyboard.press("Tab")
        if page.evaluate("element => document.activeElement === element", element):
            style = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert style != "none"
            return
    raise AssertionError(f"the Tab key does not come to {target}")
