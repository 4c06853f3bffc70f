"""Benchmarks: `python -m bench.NAME`. Each states its goal, ends with one JSON object, and exits 1 when it misses."""
