#!/usr/bin/env bash
# Train on GPU nodes under Slurm. One process per node drives all GPUs of the node; jax finds the
# other processes from Slurm.
#
#   sbatch --nodes=4 launch/slurm.sh --config=spoken_scenes --workdir=/shared/runs/scenes
#
# All nodes must see the workdir. When Slurm stops the job (signal below), it saves a checkpoint, exits
# with status 42 and is requeued; the same command then resumes the run.
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
# The trap ends the first wait; wait again, for the checkpoint to be written.
if [ "$status" -gt 128 ]; then wait "$job"; status=$?; fi
if [ "$status" -eq 42 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
