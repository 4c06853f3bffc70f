"""The command-line tools, which are thin wrappers around `trainer/` and `model/`.

`python -m tools.NAME --help` describes each tool.
"""
