#!/usr/bin/env bash
# Build the image from the Dockerfile as it is, and run it, without a Docker engine: `make image-test`.
#
# PYTHON_IMAGE=…  the base, by default the Dockerfile's own. One that no registry gives is made of Debian's packages and
#                 stands under the same name: its Python is the same release, at another path.
# SUITE=…         Debian's release for that.
# EXTRA=…         cpu or gpu (without TensorRT, and run on the CPU)
set -euo pipefail
cd "$(dirname "$0")/.."

declared=$(sed -n 's/^ARG PYTHON_IMAGE=//p' Dockerfile)
base=${PYTHON_IMAGE:-$declared}
suite=${SUITE:-${base##*-}}
extra=${EXTRA:-cpu}
image=localhost/dvt-serve:test-$extra
flags=(--format docker --isolation chroot --network host --ulimit nofile=4096:4096)

missing=$(for tool in buildah podman runc; do command -v "$tool" >/dev/null || echo "$tool"; done)
if [ -n "$missing" ]; then
    echo "make image-test needs" $missing "(on Debian: apt-get install buildah podman runc mmdebstrap)" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "make image-test runs containers with runc and cgroupfs, which only root may: sudo make image-test" >&2
    exit 1
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if ! podman image exists "$base" && ! podman pull --quiet "$base" 2>"$scratch/why"; then
    if ! command -v mmdebstrap >/dev/null; then
        echo "make image-test cannot have $base ($(tail -n1 "$scratch/why")), nor make one of Debian's packages:" \
            "apt-get install mmdebstrap, or PYTHON_IMAGE=…" >&2
        exit 1
    fi
    echo "No registry gives $base: one is made of Debian's packages ($suite)"
    mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$scratch/base.tar" \
        "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
    podman import --quiet "$scratch/base.tar" "$base"
fi

# The network's own certificates, where it has any, are for the build alone.
certificates=/etc/ssl/certs/ca-certificates.crt
if [ -f "$certificates" ]; then
    printf '[global]\ncert = %s\n' "$certificates" >"$scratch/pip.conf"
    flags+=(--volume /etc/ssl/certs:/etc/ssl/certs:ro --volume "$scratch/pip.conf:/etc/pip.conf:ro")
fi
flags+=(--build-arg "PYTHON_IMAGE=$base" --build-arg "EXTRA=$extra" --build-arg TENSORRT=0 --layers)

buildah build "${flags[@]}" --tag "$image" .
buildah build "${flags[@]}" --target sbom --output "type=local,dest=$scratch/sbom" .
podman image inspect --format "$image of $base: {{.Size}} bytes" "$image"

IMAGE_UNDER_TEST="$image" SBOM_UNDER_TEST="$scratch/sbom/dvt-serve.cdx.json" python -m pytest -m image tests/deploy "$@"
