#!/usr/bin/env bash
# GPU nodes under Slurm: one process a node, which drives all of the node's GPUs; jax finds its peers from Slurm.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/spoken_scenes.py --workdir=/shared/runs/scenes
#
# The workdir must be visible to all nodes. A job that Slurm stops (signal below) saves a checkpoint, exits with 42 and
# is put back into the queue, where the same command goes on from there.
#SBATCH --job-name=c2f
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -uo pipefail
srun --kill-on-bad-exit=0 c2f train --distributed "$@" &
job=$!
trap 'pkill -TERM -P "$job" 2>/dev/null || kill -TERM "$job"' TERM
wait "$job"; status=$?
if [ "$status" -gt 128 ]; then wait "$job"; status=$?; fi  # the trap ended the first wait: let the checkpoint be written
if [ "$status" -eq 42 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
