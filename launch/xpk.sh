#!/usr/bin/env bash
# Train on a GKE cluster that xpk made (`pip install xpk`): one workload, one process on each host.
#
#   export NAME=scenes CLUSTER=tpus PROJECT=my-project ZONE=us-east5-b TPU_TYPE=v6e-32 IMAGE=...
#   launch/xpk.sh train --config=spoken_scenes --workdir=gs://bucket/runs/scenes
#   launch/xpk.sh watch
#   launch/xpk.sh stop           # deletes the workload; `train` resumes from its last checkpoint
#
#   NAME, CLUSTER, PROJECT, ZONE   for every command
#   TPU_TYPE                       for train: generation and size, such as v6e-32 or tpu7x-2x2x2
#   IMAGE                          for train: made from launch/Dockerfile.tpu
#   MAX_RESTARTS=100               for train: after a crash (status 1, 127 or more) or a preemption (42)
#
# What costs: the nodes of the cluster, until `xpk cluster delete`; `stop` ends them only where the
# cluster scales down by itself. The bucket costs too.
set -euo pipefail
source "$(dirname "$0")/common.sh"
command=${1:-}
case "$command" in
  -h | --help) usage; exit 0 ;;
  train | watch | stop) shift ;;
  *) fail "give one of train, watch, stop; see --help" ;;
esac
need NAME CLUSTER PROJECT ZONE
where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")

case "$command" in
  train)
    need TPU_TYPE IMAGE
    [ "$#" -gt 0 ] || fail "give the arguments of c2f train"
    run xpk workload create --workload="$NAME" "${where[@]}" --tpu-type="$TPU_TYPE" --num-slices=1 \
      --docker-image="$IMAGE" --max-restarts="${MAX_RESTARTS:-100}" --restart-on-exit-codes=1 \
      --termination-grace-period-seconds=120 --command="$(show c2f train --distributed "$@")"
    ;;
  watch)
    run xpk workload list "${where[@]}" --filter-by-job="$NAME"
    run kubectl logs --follow --tail=40 --prefix --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  stop) run xpk workload delete --workload="$NAME" "${where[@]}" ;;
esac
