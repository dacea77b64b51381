"""Pages in the system's Chromium, with the network off; where playwright or Chromium is missing the tests skip."""

import os
import shutil
from pathlib import Path

import pytest

from metaint.views.drawing.view import View


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this system")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens HTML, or a page that is there; the test fails if one asks for anything else, complains or alerts."""
    wrong, contexts = [], []

    def opened(body, scheme="light", size=(1200, 900), scripts=True):
        path = body if isinstance(body, Path) else View(body).save(tmp_path / f"page-{len(contexts)}.html")
        context = browser.new_context(
            offline=True,
            color_scheme=scheme,
            viewport={"width": size[0], "height": size[1]},
            java_script_enabled=scripts,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: request.url == path.as_uri() or wrong.append(f"asked for {request.url}"))
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"alert {dialog.message}"), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def screenshots(tmp_path):
    """Where screenshots go: METAINT_SCREENSHOTS, to look at them, or a folder that is forgotten."""
    folder = Path(os.environ.get("METAINT_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
