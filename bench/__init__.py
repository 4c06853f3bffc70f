"""Benchmarks, which are started with `python -m bench.NAME`.

The docstring of each benchmark states its goal. A benchmark prints a JSON object as its last line, and exits with code
1 if it misses the goal.

An *arm* is one of the variants that a benchmark compares. A *peer* is an arm that uses another library. The *kit* is a
set of small public speech and sound datasets in the folder $KIT_DIR.
"""
