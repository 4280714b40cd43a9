#!/usr/bin/env bash
# Distil SDXL, or a fine-tune of it, on one GPU:
#     DATA=my_images bash scripts/train_sdxl.sh [more arguments of the trainer]
# DATA is a folder of captioned images, or a dataset's name. Rank, rate, loss and batch
# are those of published LCM-LoRA recipes; nothing here has been run on the real weights yet.
# Variables change the settings below; DRY_RUN=1 prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
: "${DATA:?give DATA=folder of captioned images, or a dataset\'s name}"

run accelerate launch --mixed_precision "${MIXED_PRECISION:-fp16}" \
  "$trainers/train_lcm_lora_sdxl.py" \
  --pretrained_teacher_model "${MODEL:-stabilityai/stable-diffusion-xl-base-1.0}" \
  --pretrained_vae_model_name_or_path "${VAE:-madebyollin/sdxl-vae-fp16-fix}" \
  "$(data "$DATA")" "$DATA" \
  --resolution "${RESOLUTION:-1024}" --random_flip --dataloader_num_workers 4 \
  --lora_rank "${RANK:-64}" --learning_rate "${LEARNING_RATE:-1e-4}" \
  --max_train_steps "${STEPS:-1000}" --train_batch_size "${BATCH_SIZE:-2}" \
  --gradient_accumulation_steps "${ACCUMULATION:-6}" --vae_encode_batch_size 1 \
  --gradient_checkpointing --use_8bit_adam --allow_tf32 \
  --checkpointing_steps 200 --checkpoints_total_limit 2 --resume_from_checkpoint latest \
  --validation_prompts "${PROMPT:-a red apple on a wooden table, photograph}" \
  --validation_steps 200 --output_dir "${OUTPUT:-outputs/lcm-lora-sdxl}" "$@"
