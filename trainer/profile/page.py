"""A profile as one self-contained HTML page; `report.html` is its template."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("report.html")


def render(tree: dict[str, Any]) -> str:
    """The page of `tree` (of `Profile.to_json`). It loads nothing, and shows names from manifests as text only."""
    # JSON within a script element ends at the first "</": no "<" may stay as such.
    data = json.dumps(tree, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{{title}}", html.escape(tree["run"])).replace("{{data}}", data)
