#!/usr/bin/env bash
# Train on a GKE cluster with JobSet: gke_tpu.yaml or gke_gpu.yaml, filled and applied. One pod is one
# host, one process drives all its chips or GPUs.
#
#   export NAME=scenes IMAGE=...
#   ACCELERATOR=tpu-v6e-slice TOPOLOGY=4x4 launch/gke.sh train --config=spoken_scenes --workdir=gs://bucket/runs/scenes
#   ACCELERATOR=nvidia-h100-80gb HOSTS=2 launch/gke.sh train --config=spoken_scenes --workdir=gs://bucket/runs/scenes
#   launch/gke.sh watch
#   launch/gke.sh stop           # saves a checkpoint, deletes the JobSet; `train` resumes
#
#   NAME              for every command; the JobSet
#   IMAGE             for train: made from launch/Dockerfile.tpu or launch/Dockerfile.gpu
#   ACCELERATOR       for train: the label of the nodes, tpu-... or nvidia-...
#   TOPOLOGY          for train on TPUs: the shape of the slice in chips, as the node pool has it
#   HOSTS             for train on GPUs: number of nodes
#   PER_HOST          for train: chips or GPUs of a host (default: 4 chips, 8 GPUs)
#   MAX_RESTARTS=100  for train: restarts after a crash or a preemption; status 2 ends the JobSet at once
#   SERVICE_ACCOUNT   for train: of Kubernetes, may write to the bucket (default: "default")
#
# kubectl must point at the cluster, which has the node pool and JobSet 0.6 or later.
# What costs: the nodes, while their pool exists, unless it scales down to nothing: `gcloud container
# node-pools delete`. `stop` alone ends no cost. The bucket costs too.
set -euo pipefail
source "$(dirname "$0")/common.sh"
command=${1:-}
case "$command" in
  -h | --help) usage; exit 0 ;;
  train | watch | stop) shift ;;
  *) fail "give one of train, watch, stop; see --help" ;;
esac
need NAME

case "$command" in
  train)
    need IMAGE ACCELERATOR
    case "$ACCELERATOR" in
      tpu*)
        need TOPOLOGY
        [[ "$TOPOLOGY" =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "TOPOLOGY=$TOPOLOGY: give chips as in 4x4"
        template=gke_tpu.yaml PER_HOST=${PER_HOST:-4} chips=$((${TOPOLOGY//x/ * }))
        [ $((chips % PER_HOST)) -eq 0 ] || fail "TOPOLOGY=$TOPOLOGY has $chips chips, not a multiple of PER_HOST=$PER_HOST"
        HOSTS=$((chips / PER_HOST))
        ;;
      nvidia*) need HOSTS; template=gke_gpu.yaml PER_HOST=${PER_HOST:-8} ;;
      *) fail "ACCELERATOR=$ACCELERATOR: give a label that starts with tpu or nvidia" ;;
    esac
    [ "$#" -gt 0 ] || fail "give the arguments of c2f train"
    export NAME IMAGE ACCELERATOR TOPOLOGY HOSTS PER_HOST MAX_RESTARTS=${MAX_RESTARTS:-100} SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
    manifest=$(python3 -c '
import json, os, string, sys
arguments = ", ".join(json.dumps(word.replace("$(", "$$(")) for word in sys.argv[2:])
print(string.Template(open(sys.argv[1]).read()).substitute(os.environ, ARGUMENTS=arguments))
' "$(dirname "$0")/$template" "$@")
    if [ -n "${DRY_RUN:-}" ]; then
      printf "kubectl apply -f - <<'EOF'\n%s\nEOF\n" "$manifest"
    else
      echo "$manifest" | kubectl apply -f -
    fi
    ;;
  watch)
    run kubectl get jobset "$NAME"
    run kubectl logs --follow --tail=40 --prefix --selector="jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  stop) run kubectl delete jobset "$NAME" ;;
esac
