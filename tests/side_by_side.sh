#!/usr/bin/env bash
# All tests, in two processes side by side: those listed mostly wait, for jobs, servers, kills and budgets.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
waiting=(tests/launcher tests/docker tests/data tests/configs tests/trainer/saving tests/trainer/watching)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
python -m pytest "${waiting[@]}" >"$log" 2>&1 &
python -m pytest tests "${waiting[@]/#/--ignore=}"
others=$?
wait $!
waited=$?
cat "$log"
exit $((others > waited ? others : waited))
