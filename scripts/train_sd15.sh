#!/usr/bin/env bash
# Distil Stable Diffusion 1.5, or a fine-tune of it, on one GPU:
#     DATA=my_images bash scripts/train_sd15.sh [more arguments of the trainer]
# DATA is a folder of captioned images, or a dataset's name. Rank, rate, loss and batch
# are those of published LCM-LoRA recipes; nothing here has been run on the real weights yet.
# Variables change the settings below; DRY_RUN=1 prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
: "${DATA:?give DATA=folder of captioned images, or a dataset\'s name}"

run accelerate launch --mixed_precision "${MIXED_PRECISION:-fp16}" \
  "$trainers/train_lcm_lora_sd15.py" \
  --pretrained_teacher_model "${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}" \
  "$(data "$DATA")" "$DATA" \
  --resolution "${RESOLUTION:-512}" --random_flip --dataloader_num_workers 4 \
  --lora_rank "${RANK:-64}" --learning_rate "${LEARNING_RATE:-1e-4}" \
  --max_train_steps "${STEPS:-1000}" --train_batch_size "${BATCH_SIZE:-12}" \
  --gradient_checkpointing --use_8bit_adam --allow_tf32 \
  --checkpointing_steps 200 --checkpoints_total_limit 2 --resume_from_checkpoint latest \
  --validation_prompts "${PROMPT:-a red apple on a wooden table, photograph}" \
  --validation_steps 200 --output_dir "${OUTPUT:-outputs/lcm-lora-sd15}" "$@"
