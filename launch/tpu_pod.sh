#!/usr/bin/env bash
# Train on a TPU pod slice: run one command on every host; jax finds the others from the environment.
#
#   launch/tpu_pod.sh NAME ZONE --config=spoken_scenes --workdir=gs://bucket/runs/scenes
#
# NAME is a TPU VM with c2f_jax on every host (`pip install -U "jax[tpu]" ".[train]"`). The workdir must
# be on gs://.
set -euo pipefail
if [ "$#" -lt 3 ]; then sed -n '2,7p' "$0" >&2; exit 2; fi
name=$1 zone=$2; shift 2
printf -v arguments ' %q' "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="c2f train --distributed$arguments"
