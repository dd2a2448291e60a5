#!/usr/bin/env bash
# Train on a slice of TPU v2 to v6e by the Cloud TPU API: a queued resource, c2f_jax on each host, one
# process on each host. For TPU7x and later see tpu_mig.sh.
#
#   export TPU_NAME=scenes ZONE=us-east5-b ACCELERATOR_TYPE=v6e-32
#   launch/tpu_vm.sh create      # ask for the slice and wait for it
#   launch/tpu_vm.sh install     # c2f_jax, as the last commit of this checkout has it, on every host
#   launch/tpu_vm.sh train --config=spoken_scenes --workdir=gs://bucket/runs/scenes
#   launch/tpu_vm.sh watch       # the log of host WORKER; Ctrl-C ends only the watching
#   launch/tpu_vm.sh stop        # saves a checkpoint; `train` resumes
#   launch/tpu_vm.sh status
#   launch/tpu_vm.sh delete
#
#   TPU_NAME, ZONE     for every command
#   ACCELERATOR_TYPE   for create: generation and size, such as v5litepod-16, v5p-32 or v6e-32
#   RUNTIME_VERSION    for create: the image (default: that of the generation)
#   SPOT=1             for create: a cheaper slice that may be taken away; then delete, create, install
#                      and train again, which resumes from the last checkpoint
#   WORKER=0           for watch: the host
#
# The workdir must be on gs://. The project is that of `gcloud config`.
# What costs: the slice, from ACTIVE until delete, whether something runs or not. `stop` does not end
# it, nor does the end of the training. The bucket costs too.
set -euo pipefail
source "$(dirname "$0")/common.sh"
command=${1:-}
case "$command" in
  -h | --help) usage; exit 0 ;;
  create | install | train | watch | stop | status | delete) shift ;;
  *) fail "give one of create, install, train, watch, stop, status, delete; see --help" ;;
esac
need TPU_NAME ZONE

on_hosts() { run gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker="$1" --command="$2"; }
state() { run gcloud compute tpus queued-resources describe "$TPU_NAME" --zone="$ZONE" --format="value(state.state)"; }

case "$command" in
  create)
    need ACCELERATOR_TYPE
    case "$ACCELERATOR_TYPE" in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v[234]-*) runtime=tpu-ubuntu2204-base ;;
      *) need RUNTIME_VERSION ;;
    esac
    flags=(--zone="$ZONE" --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="${RUNTIME_VERSION:-${runtime:-}}")
    if [ -n "${SPOT:-}" ]; then flags+=(--spot); fi
    run gcloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" "${flags[@]}"
    while :; do
      now=$(state)
      case "$now" in
        ACTIVE) echo "$TPU_NAME is ACTIVE and costs until: ${0##*/} delete"; break ;;
        FAILED | SUSPEND*) echo "tpu_vm.sh: $TPU_NAME is $now: ${0##*/} delete, then create again" >&2; exit 1 ;;
      esac
      if [ -n "${DRY_RUN:-}" ]; then echo "$now"; break; fi
      echo "$TPU_NAME: $now"
      sleep 30
    done
    ;;
  install)
    pack
    run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:c2f_source.tar.gz" --zone="$ZONE" --worker=all
    on_hosts all "$ON_HOST_INSTALL"
    ;;
  train)
    [ "$#" -gt 0 ] || fail "give the arguments of c2f train"
    on_hosts all "$(on_host_train "$@")"
    ;;
  watch) on_hosts "${WORKER:-0}" "$ON_HOST_WATCH" ;;
  stop) on_hosts all "$ON_HOST_STOP" ;;
  status) state ;;
  delete) run gcloud compute tpus queued-resources delete "$TPU_NAME" --zone="$ZONE" --force --quiet ;;
esac
