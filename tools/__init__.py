"""Command-line tools: thin commands over `trainer/` and `model/`. Run one with `python -m tools.NAME --help`."""
