#!/usr/bin/env bash
# Run all tests: tests/run_all.sh PYTHON JOBS
# The files of tests are distributed over JOBS processes. Many tests start processes and limit how long they wait for
# them, so on a loaded machine, a test may fail that passes alone. If at most five tests fail, they run again, one after
# another. Their names are printed, because a test that often needs a second run has a defect.
set -uo pipefail
python=$1 jobs=$2
report=(--durations=40 --durations-min=3)
# With two threads for each of JOBS processes, threads of one process wait for those of the others.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The list of failed tests must only contain those of this run.
rm -rf .pytest_cache/v/cache/lastfailed
"$python" -m pytest -n "$jobs" --dist loadfile --no-loadscope-reorder "${report[@]}"
status=$?
# Exit code 1 means that tests failed. Other errors cannot be repeated for single tests.
[ "$status" -eq 1 ] || exit "$status"
failed=$("$python" -c 'import json; print(len(json.load(open(".pytest_cache/v/cache/lastfailed"))))') || exit 1
[ "$failed" -le 5 ] || { echo "error: $failed tests failed" >&2; exit 1; }
echo "The $failed failed tests run again, one after another:"
exec "$python" -m pytest --last-failed -rA "${report[@]}"
