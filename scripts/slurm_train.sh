#!/usr/bin/env bash
# Train on a SLURM cluster, one task a GPU; the arguments are main.py's, RUN and DIR (CIFAR-10) on a disk that all nodes share. From here:
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 scripts/slurm_train.sh --config=configs/resnet.py --workdir=RUN --config.data.dir=DIR
# Two minutes before its time is up, or when it is preempted, the job saves, ends with 75 and is queued again.
# Without SLURM the same job is one command a process, at the same time, such as (one GPU each by CUDA_VISIBLE_DEVICES):
#   host1$ scripts/train.sh ARGUMENTS --distributed=host1:12355,2,0
#   host2$ scripts/train.sh ARGUMENTS --distributed=host1:12355,2,1
#SBATCH --job-name=cifar_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit 1 # SLURM runs a copy of this file
. scripts/setup.sh # once, before the tasks: they share the folder

trap : TERM # the tasks are told too: wait for them
# tasks end by themselves, together; 75 of the first must not have the others killed
srun --kill-on-bad-exit=0 --wait=60 "$PY" main.py "$@" --distributed=auto
code=$?
case $code in
  75) if scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
        echo "slurm_train: interrupted; queued again to go on from its checkpoint" >&2
        scontrol requeue "$SLURM_JOB_ID"
      else # scancel, or SLURM queues it again itself
        echo "slurm_train: interrupted; sbatch the same command to go on from its checkpoint" >&2
      fi ;;
  0 | 2 | 3) ;;
  *) echo "slurm_train: a task ended with code $code; sbatch the same command to go on from the last checkpoint" >&2 ;;
esac
exit $code
