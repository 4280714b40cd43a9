#!/usr/bin/env bash
# From nothing to a picture: install, distil the demo teacher into an LCM-LoRA, compare it with the teacher.
# Two CPU cores and no GPU are enough: about a quarter of an hour. Extra arguments go to the trainer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
out=${OUTPUT_DIR:-outputs/quickstart-sd15}

accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  --num_cpu_threads_per_process "$(python -c 'import os; print(os.cpu_count())')" \
  train_lcm_lora_sd15.py \
  --pretrained_teacher_model demo/teacher-sd15 --dataset_name demo/data --resolution 64 \
  --lora_rank 32 --learning_rate 3e-4 --lr_scheduler cosine --num_ddim_timesteps 10 --w_min 2.5 --w_max 3.5 \
  --train_batch_size 16 --max_train_steps 600 --checkpointing_steps 300 --checkpoints_total_limit 1 \
  --validation_prompts "red apple, noto style" "penguin, fluent flat style" --validation_steps 300 \
  --report_to tensorboard --output_dir "$out" "$@"

python infer.py --lora "$out" --compare --output "$out/compare.png" \
  --prompt "red apple, noto style" "penguin, fluent flat style" "rocket, noto style" "face with tears of joy, fluent flat style"
echo "Done. The LoRA: $out/pytorch_lora_weights.safetensors  The picture: $out/compare.png"
