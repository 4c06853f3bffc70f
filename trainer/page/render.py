"""A report as one self-contained HTML page: a template, what all templates share, and the data."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

_STYLE, _ELEMENTS = (Path(__file__).with_name(name) for name in ("base.css", "elements.js"))


def render(template: Path, title: str, tree: dict[str, Any]) -> str:
    """The page of `tree`. It loads nothing, and shows names from manifests as text only.

    Args:
        template: HTML with `{{title}}`, `{{style}}` (base.css), `{{data}}` and `{{elements}}` (elements.js) in it.
        title: text.
        tree: JSON values; the page's script finds them in `data`.
    """
    # JSON within a script element ends at the first "</": no "<" may stay as such.
    data = json.dumps(tree, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    page = template.read_text(encoding="utf-8")
    page = page.replace("{{style}}", _STYLE.read_text(encoding="utf-8"))
    page = page.replace("{{elements}}", _ELEMENTS.read_text(encoding="utf-8"))
    return page.replace("{{title}}", html.escape(title)).replace("{{data}}", data)
