#!/usr/bin/env bash
# Train on GPU nodes under Slurm. One process per node drives all GPUs of the node; jax finds the
# other processes from Slurm.
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=32 launch/slurm.sh \
#     --config=spoken_scenes --workdir=/shared/runs/scenes
#
# All nodes must see the workdir. 120 s before the time limit, and when Slurm preempts the job, the
# processes get SIGTERM, save a checkpoint and exit with 42; the job is requeued and resumes. Any other
# status ends the job with that status.
#
#   C2F=c2f     the program
#   DRY_RUN=1   prints the command of the nodes instead
#
# To watch: squeue --me; tail -F slurm-JOB.out. To stop for good: scancel JOB (KillWait of slurm.conf,
# 30 s by default, must suffice for the checkpoint). To stop and resume: scancel --signal=TERM JOB.
# What costs: the nodes, from the start of the job to its end.
#SBATCH --job-name=c2f
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
case "${1:-}" in -h | --help) awk 'NR > 1 { if (!/^#/ || /^#SBATCH/) exit; sub(/^# ?/, ""); print }' "$0"; exit 0 ;; esac
fail() { echo "slurm.sh: $1" >&2; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || fail "SLURM_JOB_ID is not set: start this script with sbatch; see --help"
if [ -z "${SLURM_GPUS_ON_NODE:-}" ] && [ "${JAX_PLATFORMS:-}" != cpu ]; then
  fail "SLURM_GPUS_ON_NODE is not set, the job has no GPU: sbatch --gpus-per-node=8 (or JAX_PLATFORMS=cpu)"
fi

# Under Slurm jax gives each process one GPU, that of its number on the node. A process that is alone on
# its node takes all of them.
if [ "${SLURM_NTASKS_PER_NODE:-1}" = 1 ] && [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi
# srun does not take this from the job by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# Processes stop one after another, each when its part of the checkpoint is written: the first must not
# end the others. When one is lost, jax ends the others.
step=(srun --kill-on-bad-exit=0 "${C2F:-c2f}" train --distributed "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf -v line '%q ' "${step[@]}"
  echo "JAX_LOCAL_DEVICE_IDS=${JAX_LOCAL_DEVICE_IDS:-} SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-} ${line% }"
  exit 0
fi

# SIGTERM for this shell alone (sbatch --signal=B:TERM@120) goes to the processes. Sent to srun, it would
# kill them.
trap 'scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || true' TERM
"${step[@]}" &
pid=$!
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
status=0
wait "$pid" || status=$?

# A job that is not running any more was cancelled, or Slurm requeues it itself.
if [ "$status" -eq 42 ] && [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
