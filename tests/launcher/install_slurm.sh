#!/bin/sh
# Programs for the tests of a real SLURM and of two hosts, where this may be: root on Debian or Ubuntu. Elsewhere those
# tests are skipped and say what is missing.
set -eu
PATH="$PATH:/usr/sbin:/sbin"
missing=""
for program in munged slurmctld slurmd sbatch ip shellcheck; do
    command -v "$program" > /dev/null || missing="$missing $program"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "not installed:$missing (that takes root on Debian); the tests that need them are skipped" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
packages="slurmctld slurmd slurm-client munge iproute2 shellcheck"
# shellcheck disable=SC2086
apt-get install -qq --no-install-recommends $packages > /dev/null 2>&1 ||
    { apt-get update -qq && apt-get install -qq --no-install-recommends $packages > /dev/null; } ||
    echo "apt-get could not install$missing; the tests that need them are skipped" >&2
