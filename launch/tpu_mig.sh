#!/usr/bin/env bash
# Train on a slice of TPU v5p, v6e, TPU7x or later by Compute Engine: a managed instance group whose
# machines are one slice, c2f_jax on each host, one process on each host.
#
#   export NAME=scenes PROJECT=my-project ZONE=us-central1-c MACHINE_TYPE=tpu7x-standard-4t TOPOLOGY=2x2x2
#   launch/tpu_mig.sh create     # ask for the slice and wait for it
#   launch/tpu_mig.sh install    # c2f_jax, as the last commit of this checkout has it, on every host
#   launch/tpu_mig.sh train --config=spoken_scenes --workdir=gs://bucket/runs/scenes
#   launch/tpu_mig.sh watch      # the log of one host; Ctrl-C ends only the watching
#   launch/tpu_mig.sh stop       # saves a checkpoint; `train` resumes
#   launch/tpu_mig.sh status
#   launch/tpu_mig.sh delete
#
#   NAME, PROJECT, ZONE      for every command
#   MACHINE_TYPE, TOPOLOGY   for create: the hosts and the shape of the slice in chips
#   PROVISIONING=STANDARD    for create: STANDARD, SPOT, FLEX_START or RESERVATION_BOUND
#   TEMPLATE_FLAGS           for create: more flags of `gcloud compute instance-templates create`, such as
#                            "--max-run-duration=7d --instance-termination-action=DELETE" for FLEX_START
#   WORKER=0                 for watch: which of the hosts, in the order of their names
#
# The workdir must be on gs://. jax finds the peers from the metadata of the machines.
# What costs: the machines, from RUNNING until delete, whether something runs or not. `stop` does not
# end it, nor does the end of the training. The bucket costs too.
set -euo pipefail
source "$(dirname "$0")/common.sh"
command=${1:-}
case "$command" in
  -h | --help) usage; exit 0 ;;
  create | install | train | watch | stop | status | delete) shift ;;
  *) fail "give one of create, install, train, watch, stop, status, delete; see --help" ;;
esac
need NAME PROJECT ZONE
region=${ZONE%-*}
group=(gcloud compute instance-groups managed)
list=("${group[@]}" list-instances "$NAME" --project="$PROJECT" --zone="$ZONE")

hosts() {
  if [ -n "${DRY_RUN:-}" ]; then
    show "${list[@]}" "--format=value(NAME)" >&2
    printf '%s\n' FIRST_HOST LAST_HOST
  else
    "${list[@]}" "--format=value(NAME)" | sort | grep . || { echo "tpu_mig.sh: $NAME has no hosts" >&2; return 1; }
  fi
}
on_host() { run gcloud compute ssh "$1" --project="$PROJECT" --zone="$ZONE" --command="$2"; }
# At the same time: the processes wait for each other.
on_hosts() {
  local host names pid pids=() status=0
  names=$(hosts)
  for host in $names; do
    if [ -n "${DRY_RUN:-}" ]; then on_host "$host" "$1"; continue; fi
    on_host "$host" "$1" &
    pids+=("$!")
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || status=$?; done
  return "$status"
}

case "$command" in
  create)
    need MACHINE_TYPE TOPOLOGY
    [[ "$TOPOLOGY" =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "TOPOLOGY=$TOPOLOGY: give chips as in 2x2x2"
    [[ "$MACHINE_TYPE" =~ -([0-9]+)t$ ]] || fail "MACHINE_TYPE=$MACHINE_TYPE: its name must end in the chips of a host, as in -4t"
    chips=$((${TOPOLOGY//x/ * })) per_host=${BASH_REMATCH[1]}
    [ $((chips % per_host)) -eq 0 ] || fail "TOPOLOGY=$TOPOLOGY has $chips chips, not a multiple of $per_host"
    case "$MACHINE_TYPE" in
      tpu7x-*) image=(--image-family=ubuntu-accel-2404-amd64-tpu-tpu7x --boot-disk-type=hyperdisk-balanced) ;;
      *) image=(--image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e) ;;
    esac
    read -ra more <<<"${TEMPLATE_FLAGS:-}"
    run gcloud compute resource-policies create workload-policy "$NAME" --project="$PROJECT" --region="$region" \
      --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
    run gcloud compute instance-templates create "$NAME" --project="$PROJECT" --instance-template-region="$region" \
      --machine-type="$MACHINE_TYPE" --provisioning-model="${PROVISIONING:-STANDARD}" --maintenance-policy=TERMINATE \
      --image-project=ubuntu-os-accelerator-images "${image[@]}" --boot-disk-size=200GB --scopes=cloud-platform \
      ${more[@]+"${more[@]}"}
    run "${group[@]}" create "$NAME" --project="$PROJECT" --zone="$ZONE" --size=$((chips / per_host)) \
      --template="projects/$PROJECT/regions/$region/instanceTemplates/$NAME" \
      --workload-policy="projects/$PROJECT/regions/$region/resourcePolicies/$NAME" \
      --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing
    # All machines come at once, when there is room for all.
    run "${group[@]}" wait-until "$NAME" --project="$PROJECT" --zone="$ZONE" --stable
    echo "$NAME costs until: ${0##*/} delete"
    ;;
  install)
    names=$(hosts)
    pack
    for host in $names; do
      run gcloud compute scp "$archive" "$host:c2f_source.tar.gz" --project="$PROJECT" --zone="$ZONE"
    done
    on_hosts "$ON_HOST_INSTALL"
    ;;
  train)
    [ "$#" -gt 0 ] || fail "give the arguments of c2f train"
    on_hosts "$(on_host_train "$@")"
    ;;
  watch) on_host "$(hosts | sed -n "$((${WORKER:-0} + 1))p")" "$ON_HOST_WATCH" ;;
  stop) on_hosts "$ON_HOST_STOP" ;;
  status) run "${list[@]}" ;;
  delete)
    run "${group[@]}" delete "$NAME" --project="$PROJECT" --zone="$ZONE" --quiet
    run gcloud compute instance-templates delete "$NAME" --project="$PROJECT" --region="$region" --quiet
    run gcloud compute resource-policies delete "$NAME" --project="$PROJECT" --region="$region" --quiet
    ;;
esac
