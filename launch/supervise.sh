#!/usr/bin/env bash
# Run a command and start it again when it crashes or is preempted.
#
#   launch/supervise.sh c2f train --config=spoken_scenes --workdir=runs/scenes
#
# Ends with the command's status when that is 0 (done), 2, 126 or 127 (a mistake that a restart cannot
# fix) or 130 (interrupted). 42 (stopped, a checkpoint is saved) starts it again after PAUSE. Any other
# status does so after a growing pause, and counts as a failure unless a checkpoint was written since
# the last start.
#
#   MAX_FAILURES=5   give up after so many failures in a row without a checkpoint
#   PAUSE=1          seconds before the first restart; doubles with each failure
#   MAX_PAUSE=300    the longest pause in seconds
#   DRY_RUN=1        prints the command instead
#
# Checkpoints are those of --workdir=... in the command, local or gs:// (by gcloud).
#
# To stop: SIGTERM, SIGINT or SIGHUP to this script. The command gets SIGTERM, saves a checkpoint, and
# its status becomes that of the script.
set -euo pipefail
case "${1:-}" in
  -h | --help) awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; exit 0 ;;
  "") echo "supervise.sh: give a command; see supervise.sh --help" >&2; exit 2 ;;
esac
max_failures=${MAX_FAILURES:-5} pause=${PAUSE:-1} max_pause=${MAX_PAUSE:-300}
if [ -n "${DRY_RUN:-}" ]; then printf -v line '%q ' "$@"; echo "${line% }"; exit 0; fi

workdir="" previous=""
for word in "$@"; do
  case "$previous $word" in
    *" --workdir="*) workdir=${word#--workdir=} ;;
    "--workdir "*) workdir=$word ;;
  esac
  previous=$word
done

# The steps of the complete checkpoints.
checkpoints() {
  case "$workdir" in
    "") ;;
    gs://*) gcloud storage ls "$workdir/checkpoints/" 2>/dev/null | grep -E '/[0-9]+/$' || true ;;
    *) find "$workdir/checkpoints" -mindepth 1 -maxdepth 1 -name '[0-9]*' ! -name '*[!0-9]*' 2>/dev/null | sort || true ;;
  esac
}

stopped="" child="" sleeper=""
stop() {
  stopped=1
  if [ -n "$sleeper" ]; then kill "$sleeper" 2>/dev/null || true; fi
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap stop TERM INT HUP

failures=0 restarts=0 status=0
while :; do
  before=$(checkpoints) began=$SECONDS
  "$@" &
  child=$!
  # A signal that came before the child was known.
  if [ -n "$stopped" ]; then kill -TERM "$child" 2>/dev/null || true; fi
  # A signal ends `wait`, not the child.
  while kill -0 "$child" 2>/dev/null; do wait "$child" 2>/dev/null || true; done
  status=0
  wait "$child" || status=$?
  child=""

  case "$status" in 0 | 2 | 126 | 127 | 130) break ;; esac
  if [ -n "$stopped" ]; then break; fi
  if [ "$(checkpoints)" != "$before" ]; then failures=0; fi
  delay=$pause why="stopped with a checkpoint"
  if [ "$status" -ne 42 ]; then
    failures=$((failures + 1))
    if [ "$failures" -ge "$max_failures" ]; then
      echo "supervise.sh: status $status after $((SECONDS - began)) s; $failures failures without a checkpoint: giving up" >&2
      break
    fi
    for ((i = 1; i < failures && delay < max_pause; i++)); do delay=$((delay * 2)); done
    if [ "$delay" -gt "$max_pause" ]; then delay=$max_pause; fi
    why="failure $failures of $max_failures"
  fi
  restarts=$((restarts + 1))
  echo "supervise.sh: status $status after $((SECONDS - began)) s, $why; restart $restarts in $delay s" >&2
  sleep "$delay" &
  sleeper=$!
  if [ -z "$stopped" ]; then wait "$sleeper" || true; fi
  sleeper=""
  if [ -n "$stopped" ]; then break; fi
done
exit "$status"
