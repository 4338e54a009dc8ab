#!/usr/bin/env bash
# Checks and measures on a GPU machine that has PyTorch and no network: tests/gpu/run.sh [OPTIONS of the benchmark]
# Wheels that it lacks are brought along in WHEELS (see tests/gpu/wheels.txt) and installed into a folder of their own.
# The tests get CHECK_S seconds, the benchmark BUDGET_S; rows are kept in ROWS, so the same command goes on where it was
# cut off. Without a GPU: DEVICE=cpu tries the same at tiny size. CHECK_S=0 measures only.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} wheels=${WHEELS:-.whl} device=${DEVICE:-cuda}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
if compgen -G "$wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    PYTHONPATH=$PWD:$site
fi
checks=0
if [ "${CHECK_S:-240}" -gt 0 ]; then
    marked=$([ "$device" = cuda ] && echo gpu || echo "not gpu")
    timeout "${CHECK_S:-240}" "$python" -m pytest tests/gpu -q -m "$marked" -p no:cacheprovider || checks=$?
    echo "checks: exit status $checks (0 passed, 1 failed, 124 cut off)"
fi
tiny=$([ "$device" = cuda ] || echo --tiny)
"$python" -m tests.benchmarks.gpu --device "$device" $tiny --rows "${ROWS:-outputs/gpu_rows.jsonl}" \
    --budget-s "${BUDGET_S:-300}" "$@" || exit $?
exit "$checks"
