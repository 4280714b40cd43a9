#!/usr/bin/env bash
# Several GPUs of one or more nodes under Slurm, for as long as it takes:
#     TRAINER=train_lcm_lora_sdxl.py sbatch scripts/accelerate/slurm.sh [arguments of the trainer]
# Nodes, GPUs and cores are those of the #SBATCH lines; options of sbatch, such as --nodes=4, go
# before the script's name. Five minutes before the time limit the trainers are told to save and
# stop, and the job is queued again and resumes. --output_dir and encoded data have to be on a file
# system that all nodes share.
#SBATCH --job-name=lcm-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=48
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" # the repository
trainer=${TRAINER:-train_lcm_lora_sdxl.py}
if [ ! -f "$trainer" ]; then
  echo "TRAINER=$trainer: no such file in $PWD; give train_lcm_lora_sd15.py or ..._sdxl.py" >&2
  exit 1
fi
: "${SLURM_GPUS_ON_NODE:?no GPU was allocated: give --gpus-per-node}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
nodes=$SLURM_JOB_NUM_NODES processes=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
export FIRST=${hosts%%$'\n'*}
# srun does not take this from sbatch
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
options=(--num_machines "$nodes" --num_processes "$processes" --main_process_port 29500
  --rdzv_backend static --same_network --dynamo_backend no
  --mixed_precision "${MIXED_PRECISION:-fp16}")
[ "$processes" = 1 ] || options+=(--multi_gpu)
stopped=
# The signal goes to what srun started, not to this script.
trap 'stopped=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1

# A launcher that SIGUSR1 ended would take its trainers with it, so it ignores the signal, to which
# they react.
srun bash -c 'trap "" USR1; exec accelerate launch --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$FIRST" "$@"' launch "${options[@]}" "$trainer" --dataloader_num_workers 4 \
  --resume_from_checkpoint latest "$@" &
code=0
wait $! || code=$?
if [ -n "$stopped" ]; then
  wait $! || true # it was the signal that ended the first one
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
