#!/usr/bin/env bash
# Run all tests: tests/run_all.sh PYTHON JOBS
# JOBS files run side by side. Many tests start processes and limit how long they wait for them, so on a loaded machine
# one can fail that passes alone. Up to five tests that fail therefore run again, one after another, and fail if they fail
# again. The names of both are printed, since a test that often needs a second run has a defect.
set -uo pipefail
python=$1 jobs=$2
report=(--durations=40 --durations-min=3)
# With two threads for each of JOBS processes, threads of one process wait for those of the others.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Only the tests of this run are remembered.
rm -rf .pytest_cache/v/cache/lastfailed
"$python" -m pytest -n "$jobs" --dist loadfile --no-loadscope-reorder "${report[@]}"
status=$?
# 1: tests ran and some failed. All other codes are not about single tests.
[ "$status" -eq 1 ] || exit "$status"
failed=$("$python" -c 'import json; print(len(json.load(open(".pytest_cache/v/cache/lastfailed"))))') || exit 1
[ "$failed" -le 5 ] || { echo "error: $failed tests failed" >&2; exit 1; }
echo "What failed beside other tests ($failed) runs again alone:"
exec "$python" -m pytest --last-failed -rA "${report[@]}"
