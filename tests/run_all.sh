#!/usr/bin/env bash
# Run all tests: tests/run_all.sh PYTHON JOBS
# The files of tests are distributed over JOBS processes. The tests on a Slurm cluster run beside them, because they
# mostly wait; their output follows that of the others. Many tests start processes and limit how long they wait for
# them, so on a loaded machine, a test may fail that passes alone. If at most five tests fail, they run again, one after
# another. Their names are printed, because a test that often needs a second run has a defect.
set -uo pipefail
python=$1 jobs=$2
report=(--durations=40 --durations-min=3)
# With two threads for each of JOBS processes, threads of one process wait for those of the others.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The two calls of pytest keep their lists of failed tests apart. The lists must only contain those of this run.
caches=(.pytest_cache/all .pytest_cache/cluster)
rm -rf "${caches[@]}"

log=$(mktemp)
"$python" -m pytest tests/cluster -o cache_dir="${caches[1]}" "${report[@]}" >"$log" 2>&1 &
cluster=$!
# Ctrl-C ends both calls, and pytest then stops the cluster.
trap 'kill -INT "$cluster" 2>/dev/null; wait "$cluster"; rm -f "$log"' EXIT

"$python" -m pytest -n "$jobs" --dist loadfile --no-loadscope-reorder --ignore=tests/cluster -o cache_dir="${caches[0]}" "${report[@]}"
codes=("$?")
echo "The tests on a Slurm cluster, which ran at the same time:"
wait "$cluster"
codes+=("$?")
trap 'rm -f "$log"' EXIT
cat "$log"

failed=0
for i in 0 1; do
  # Exit code 1 means that tests failed. Other errors cannot be repeated for single tests.
  [ "${codes[i]}" -le 1 ] || exit "${codes[i]}"
  [ "${codes[i]}" -eq 0 ] && continue
  list=${caches[i]}/v/cache/lastfailed
  count=$("$python" -c 'import json, sys; print(len(json.load(open(sys.argv[1]))))' "$list") || exit 1
  failed=$((failed + count))
done
[ "$failed" -gt 0 ] || exit 0
[ "$failed" -le 5 ] || { echo "error: $failed tests failed" >&2; exit 1; }
echo "The $failed failed tests run again, one after another:"
for i in 0 1; do
  [ "${codes[i]}" -eq 0 ] && continue
  "$python" -m pytest --last-failed -o cache_dir="${caches[i]}" -rA "${report[@]}" || exit 1
done
