"""Self-contained HTML reports, built from a template, a shared stylesheet, shared JavaScript helpers and the data."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

_STYLE, _ELEMENTS = (Path(__file__).with_name(name) for name in ("base.css", "elements.js"))


def render(template: Path, title: str, tree: dict[str, Any]) -> str:
    """Return the HTML page of a report.

    The page loads no other files. Names that come from manifests are never parsed as HTML.

    Args:
        template: An HTML file that contains `{{title}}`, `{{style}}` (for base.css), `{{data}}` and `{{elements}}` (for
            elements.js).
        title: The title, as plain text.
        tree: The report's data (JSON-serializable). elements.js makes it available to the page's script as the constant
            `data`.
    """
    # The first "</" would end the script element that contains the JSON, so every "<" is escaped.
    data = json.dumps(tree, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    page = template.read_text(encoding="utf-8")
    page = page.replace("{{style}}", _STYLE.read_text(encoding="utf-8"))
    page = page.replace("{{elements}}", _ELEMENTS.read_text(encoding="utf-8"))
    return page.replace("{{title}}", html.escape(title)).replace("{{data}}", data)
