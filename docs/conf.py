"""The Sphinx configuration of the documentation site: `make docs` builds it into site/.

The pages are the repository's Markdown files, unmodified, so that every link works on a code host as well as on the
site. A link to a file that does not exist, or to a heading that does not exist, is an error.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

project = "earshot"
author = "The earshot maintainers"
copyright = "The earshot maintainers, Apache-2.0"

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "README"
include_patterns = [
    "README.md",
    "BENCHMARKS.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "ds_configs/README.md",
    "requirements/README.md",
    "docs/*.md",
]
exclude_patterns = [".venv*", "runs", "site"]  # Otherwise, Sphinx would search these folders.
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = "earshot"
html_copy_source = False
html_show_sphinx = False

PAGES = {
    "Tutorials": ["docs/tutorial_recordings", "docs/tutorial_cluster", "docs/tutorial_encoder"],
    "Use": [
        "docs/recipe",
        "docs/data",
        "docs/training",
        "docs/finetune",
        "docs/encoders",
        "docs/published",
        "docs/connectors",
        "docs/adapters",
        "docs/llms",
        "docs/experts",
        "docs/plan",
        "docs/slurm",
        "docs/operations",
        "docs/checkpoints",
        "ds_configs/README",
    ],
    "Evaluate and serve": ["docs/evaluation", "docs/profile", "docs/export"],
    "Understand": ["docs/architecture", "docs/security", "docs/glossary", "docs/gpu", "docs/scale", "BENCHMARKS"],
    "Contribute": ["CONTRIBUTING", "CHANGELOG"],
}


def setup(app: Any) -> None:
    """Add the site's table of contents, and a start page under the name that web servers look for."""
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _add_index)


def _add_contents(app: Any, docname: str, source: list[str]) -> None:
    # README.md itself has no table of contents, because a code host would show its directives as text.
    if docname == root_doc:
        listed = {root_doc, *(page for pages in PAGES.values() for page in pages)}
        contents = {**PAGES, "More": sorted(app.env.found_docs - listed)}
        existing = {title: [p for p in pages if p in app.env.found_docs] for title, pages in contents.items()}
        trees = [
            "\n".join(["", "", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```"])
            for title, pages in existing.items()
            if pages
        ]
        source[0] += "".join(trees) + "\n"


def _add_index(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        folder = Path(app.outdir)
        shutil.copyfile(folder / f"{root_doc}.html", folder / "index.html")
