#!/usr/bin/env bash
# Builds docker/Dockerfile where there is no Docker engine: buildah in a chroot, on a Debian made by debootstrap.
# Needs buildah and debootstrap (Debian packages). Usage: rootless_build.sh FOLDER [PROGRAM ARGUMENT...]
# FOLDER keeps base, layers and logs for the next time; the arguments go to the image's entrypoint (default: --help).
# PIP_FIND_LINKS and SSL_CERT_FILE, where set, are made known to the build.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
export BUILDAH_ISOLATION=chroot
policy=(--signature-policy "$folder/policy.json")
buildah=(buildah --root "$folder/store" --runroot "$folder/run" --storage-driver vfs)
echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$folder/policy.json"

if ! "${buildah[@]}" inspect --type image localhost/base >/dev/null 2>&1; then
    [ -e "$folder/rootfs/usr/bin/apt-get" ] || debootstrap --variant=minbase bookworm "$folder/rootfs" >"$folder/debootstrap.log"
    tar -C "$folder/rootfs" --exclude=./dev --exclude=./proc --exclude=./sys -cf "$folder/base.tar" .
    base=$("${buildah[@]}" from scratch)
    "${buildah[@]}" add -q "$base" "$folder/base.tar" /
    if [ -n "${SSL_CERT_FILE:-}" ]; then
        "${buildah[@]}" copy -q "$base" "$SSL_CERT_FILE" /host-certificates.crt
        "${buildah[@]}" config --env PIP_CERT=/host-certificates.crt "$base"
    fi
    if [ -n "${PIP_FIND_LINKS:-}" ]; then
        "${buildah[@]}" copy -q "$base" "$PIP_FIND_LINKS" /wheels
        "${buildah[@]}" config --env PIP_FIND_LINKS=/wheels "$base"
    fi
    "${buildah[@]}" commit -q "${policy[@]}" --rm "$base" localhost/base
    rm "$folder/base.tar"
fi

revision=$(git -C "$root" describe --always --abbrev=40 --dirty=+)
"${buildah[@]}" bud --isolation chroot --network host --format docker --pull-never "${policy[@]}" \
    --build-arg BASE=localhost/base --build-arg REVISION="$revision" \
    --file "$root/docker/Dockerfile" --tag localhost/twinflow-trainer "$root"
"${buildah[@]}" inspect --type image --format '{{.Docker.Config.User}} {{.Docker.Config.Entrypoint}}' localhost/twinflow-trainer
container=$("${buildah[@]}" from --pull-never "${policy[@]}" localhost/twinflow-trainer)
trap '"${buildah[@]}" rm "$container" >/dev/null' EXIT
"${buildah[@]}" run --isolation chroot --network host "$container" -- /opt/twinflow/docker/entrypoint.sh "${@:---help}"
