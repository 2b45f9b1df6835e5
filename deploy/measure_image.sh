#!/usr/bin/env bash
# How large an image is, how long it takes to be ready, and what memory it holds then: deploy/measure_image.sh IMAGE [RUNS]
set -euo pipefail
image=$1
port=${PORT:-18765}
run=(podman --runtime runc --cgroup-manager cgroupfs run --detach --network host --no-healthcheck --read-only
    --cap-drop all --ulimit nofile=4096:4096 --ulimit nproc=4096:4096
    --env DVT_OPEN_CONTROL=true --env DVT_HOST=127.0.0.1 --env "DVT_PORT=$port")

podman image inspect --format '{{.Size}}' "$image" | awk '{ printf "unpacked           %6.0f MB\n", $1 / 1e6 }'
podman save --format oci-archive "$image" 2>/dev/null | wc -c | awk '{ printf "as it travels      %6.0f MB\n", $1 / 1e6 }'
for _ in $(seq "${2:-5}"); do
    for options in "" "--env=DVT_PROFILE_SECONDS=0"; do
        container=$("${run[@]}" ${options:+"$options"} "$image")
        began=$(date +%s%N)
        pid=$(podman inspect --format '{{.State.Pid}}' "$container")
        until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/readyz"; do kill -0 "$pid"; done
        ready=$(date +%s%N)
        awk -v ms=$(((ready - began) / 1000000)) -v what="${options#*=DVT_}" '
            /^VmRSS/ { rss = $2 / 1024 } /^Threads/ { threads = $2 }
            END { printf "ready after        %6.2f s, %.0f MiB resident, %d threads %s\n", ms / 1000, rss, threads, what }
        ' "/proc/$pid/status"
        podman rm --force --time 0 "$container" >/dev/null
    done
done
