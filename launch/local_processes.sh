#!/usr/bin/env bash
# Train in several processes on this machine: a rehearsal of a run on several hosts, or one process for
# each GPU.
#
#   launch/local_processes.sh 2 --config=spoken_scenes --workdir=runs/scenes
#   GPUS=0,1,2,3 launch/local_processes.sh 4 --config=spoken_scenes --workdir=runs/scenes
#
# One process drives all GPUs of a machine as well: without this script, `c2f train`.
#
#   GPUS             numbers of the GPUs, one for each process; without it the processes run on the CPU
#   PORT             where the processes meet on the loopback (default: a free port)
#   KILL_AFTER=10    seconds from SIGTERM to SIGKILL for the others, once a process has failed
#   C2F=c2f          the program
#
# When a process fails, the others are ended, and its status is that of the script. To stop: SIGTERM or
# Ctrl-C; each process gets SIGTERM and saves its part of a checkpoint (status 42).
set -euo pipefail
source "$(dirname "$0")/common.sh"
case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "" | *[!0-9]* | 0) fail "give the number of processes first; see --help" ;;
esac
processes=$1
shift
gpus=()
if [ -n "${GPUS:-}" ]; then
  IFS=, read -ra gpus <<<"$GPUS"
  [ "${#gpus[@]}" -eq "$processes" ] || fail "GPUS=$GPUS names ${#gpus[@]} GPUs for $processes processes"
fi
[ "${BASH_VERSINFO[0]}" -ge 5 ] || fail "bash 5 is needed, this is $BASH_VERSION"
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

alive=() stopped=""
running() { kill -0 "$1" 2>/dev/null; }
any_running() { for pid in "${alive[@]}"; do if running "$pid"; then return 0; fi; done; return 1; }
signal_all() { for pid in ${alive[@]+"${alive[@]}"}; do kill "-$1" "$pid" 2>/dev/null || true; done; }
trap 'stopped=1; signal_all TERM' TERM INT HUP

for ((i = 0; i < processes; i++)); do
  command=("${C2F:-c2f}" train "$@" "--coordinator=127.0.0.1:$port" "--num-processes=$processes" "--process-id=$i")
  if [ -n "${GPUS:-}" ]; then
    command=(env "CUDA_VISIBLE_DEVICES=${gpus[i]}" "${command[@]}")
  else
    command=(env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "${command[@]}")
  fi
  if [ -n "${DRY_RUN:-}" ]; then show "${command[@]}"; continue; fi
  "${command[@]}" &
  alive+=("$!")
done
# A signal that came while they started.
if [ -n "$stopped" ]; then signal_all TERM; fi

# The status of the first process that failed; 42 if none did and some were stopped.
result=0 failed=""
while [ "${#alive[@]}" -gt 0 ]; do
  wait -n "${alive[@]}" 2>/dev/null || true # a process ended, or a signal came
  left=()
  for pid in "${alive[@]}"; do
    if running "$pid"; then left+=("$pid"); continue; fi
    status=0
    wait "$pid" || status=$?
    if [ -n "$failed" ] || [ "$status" -eq 0 ]; then continue; fi
    result=$status
    if [ "$status" -ne 42 ]; then failed=$pid; fi
  done
  alive=(${left[@]+"${left[@]}"})

  # The others may wait for the failed one in a collective, where SIGTERM does not end them.
  if [ -n "$failed" ] && [ "${#alive[@]}" -gt 0 ]; then
    echo "local_processes.sh: a process ended with status $result; ending the others" >&2
    signal_all TERM
    last=$((SECONDS + ${KILL_AFTER:-10}))
    while [ "$SECONDS" -lt "$last" ] && any_running; do sleep 0.1; done
    signal_all KILL
  fi
done
exit "$result"
