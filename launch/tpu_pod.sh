#!/usr/bin/env bash
# A TPU pod slice: the same command on every host; jax finds its peers from the TPU environment.
#
#   launch/tpu_pod.sh NAME ZONE --config=configs/spoken_scenes.py --workdir=gs://bucket/runs/scenes
#
# NAME is a TPU VM on whose hosts c2f_jax is installed (`pip install -U "jax[tpu]" .`). The workdir must be gs://.
set -euo pipefail
if [ "$#" -lt 3 ]; then sed -n '2,6p' "$0" >&2; exit 2; fi
name=$1 zone=$2; shift 2
printf -v arguments ' %q' "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="c2f train --distributed$arguments"
