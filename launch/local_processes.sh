#!/usr/bin/env bash
# Start several training processes on this machine, as a rehearsal of a run on several hosts.
#
#   launch/local_processes.sh 2 --config=spoken_scenes --workdir=runs/scenes
set -euo pipefail
if [ "$#" -lt 2 ]; then sed -n '2,4p' "$0" >&2; exit 2; fi
processes=$1; shift
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT INT TERM
for ((i = 0; i < processes; i++)); do
  c2f train "$@" --coordinator="127.0.0.1:$port" --num-processes="$processes" --process-id="$i" &
  pids+=("$!")
done
for pid in "${pids[@]}"; do wait "$pid"; done
trap - EXIT
