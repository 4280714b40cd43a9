#!/usr/bin/env bash
# Two nodes of eight GPUs under Slurm, for as long as it takes:
#     sbatch scripts/accelerate/slurm.sh [arguments of the trainer]
# Five minutes before the time limit the trainers are told to save and stop, and the job is queued
# again and resumes. --output_dir and --cache_dir have to be on a file system that both nodes share.
#SBATCH --job-name=lcm-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" # the repository
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export FIRST=${hosts%%$'\n'*}
stopped=
# The signal goes to what srun started, not to this script.
trap 'stopped=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# A launcher that SIGUSR1 ended would take its trainers with it, so it ignores the signal, to which
# they react.
srun bash -c 'trap "" USR1; exec accelerate launch --config_file scripts/accelerate/two_nodes.yaml \
  --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST" "$@"' launch \
  train_lcm_lora_sdxl.py --resume_from_checkpoint latest "$@" &
code=0
wait $! || code=$?
if [ -n "$stopped" ]; then
  wait $! || true # it was the signal that ended the first one
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
