#!/bin/sh
# `docker run IMAGE train configs/smoke.yaml` is `twinflow train configs/smoke.yaml`; a program's name runs that program.
set -eu
# A user chosen with --user has no home folder, and every library wants to write to one.
if [ ! -w "${HOME:-/}" ]; then
    HOME=$(mktemp -d)
    export HOME
fi
if [ $# -gt 0 ] && command -v "$1" >/dev/null; then
    exec "$@"
fi
exec twinflow "$@"
