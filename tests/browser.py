"""Helpers that render report pages in Chromium without a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_SEC = 60


def need_chromium() -> None:
    """Skip the calling test module if Chromium is not installed, except in CI, which must have it."""
    if CHROMIUM is None and "CI" not in os.environ:
        pytest.skip("chromium is not installed: apt-get install chromium", allow_module_level=True)


class Page(HTMLParser):
    """A page after a browser has rendered it."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.dom = dom
        self.root: dict[str, str | None] = {}
        self.numbers: dict[str, float] = {}
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.titles: set[str | None] = set()
        self.current: list[str | None] = []
        self.rows: list[str] = []
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.root = self.root or found
        self.titles.add(found.get("title"))
        if tag == "section":
            self.ids.add(str(found["id"]))
        if "data-key" in found:
            assert found["data-key"] not in self.numbers, found["data-key"]
            self.numbers[str(found["data-key"])] = float(str(found["data-value"]))
        if "data-row" in found:
            self.rows.append(str(found["data-row"]))
        if "aria-current" in found and found["aria-current"] == "true":
            self.current.append(found["href"])


def browse(path: Path, address: str = "") -> Page:
    """Return the page as Chromium shows it after the page's script has run.

    Args:
        path: The page's file.
        address: What follows the path in the URL, such as `#tab`.
    """
    return browse_url(f"file://{path}{address}", path.parent)


def browse_url(url: str, scratch: Path) -> Page:
    """Return the page at a URL as Chromium shows it after the page's script has run and its requests are answered."""
    assert CHROMIUM is not None, "chromium is not installed, although .ci/run installs it"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    command += [
        "--autoplay-policy=no-user-gesture-required",
        "--allow-file-access-from-files",
        "--hide-scrollbars",
        f"--user-data-dir={scratch / 'chromium'}",
        url,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        dom, _ = process.communicate(timeout=TIMEOUT_SEC)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # including its child processes
        except ProcessLookupError:
            pass
        process.wait()
    assert process.returncode == 0, process.returncode
    return Page(dom)


WIDTHS = (360, 768, 1280, 2560)
"""The widths in pixels at which pages must be readable: a phone, a tablet, a laptop and a large screen."""
_MEASURE = """
addEventListener("load", () => setTimeout(() => {
  document.documentElement.dataset.found = JSON.stringify([...document.querySelectorAll("iframe")].map((frame) => {
    const root = frame.contentDocument.documentElement;
    return { overflow: root.scrollWidth - frame.clientWidth, height: root.scrollHeight, state: root.dataset.state };
  }));
}, 300));
"""


def measure(path: Path) -> dict[int, dict[str, Any]]:
    """Return, for each of `WIDTHS`, by how many pixels a page is wider than the screen, its height, and its state.

    The page is shown in frames, because a browser's own window has a minimum width.
    """
    frame = f"<iframe src='{path.name}' style='width:{{}}px;height:900px;border:0;display:block'></iframe>"
    frames = path.with_name("frames.html")
    frames.write_text("".join(frame.format(width) for width in WIDTHS) + f"<script>{_MEASURE}</script>")
    page = browse(frames)
    return dict(zip(WIDTHS, json.loads(str(page.root["data-found"])), strict=True))


def then_run(path: Path, name: str, script: str) -> Path:
    """Write a copy of the page that also runs `script` after its own script."""
    changed = path.with_name(name)
    text = path.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    changed.write_text(text, encoding="utf-8")
    return changed
