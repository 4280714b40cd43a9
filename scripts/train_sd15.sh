#!/usr/bin/env bash
# Distil Stable Diffusion 1.5, or a fine-tune of it, on one GPU of 8 GB or more:
#     DATA=my_images bash scripts/train_sd15.sh [more arguments of the trainer]
# DATA is a folder of images with their captions, encoded data, tar shards or a dataset's name. The
# batch, always 12 images a step, and what saves memory are those for your card
# (docs/memory-and-speed.md). Rank, rate and loss are those of published LCM-LoRA recipes; nothing
# here has been run on the real weights yet. Variables change the settings below; CARD=12 is a GPU
# of 12 GB. DRY_RUN=1 prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
: "${DATA:?give DATA=folder of images with captions, or a dataset\'s name}"
model=${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}
output=${OUTPUT:-outputs/lcm-lora-sd15-$(model_name "$model")}
card 8 "6 --gradient_checkpointing" 12 "4" 16 "6" 24 "12"

run python "$trainers/train_lcm_lora_sd15.py" --pretrained_teacher_model "$model" \
  "$(data "$DATA")" "$DATA" --resolution "${RESOLUTION:-512}" $(crop "$DATA") \
  --dataloader_num_workers 4 --train_batch_size "$batch" \
  --gradient_accumulation_steps "$accumulation" --vae_encode_batch_size 1 $saving \
  ${precision:+--mixed_precision "$precision"} --allow_tf32 --lora_rank "${RANK:-64}" \
  --learning_rate "${LEARNING_RATE:-1e-4}" --max_train_steps "${STEPS:-1000}" \
  --checkpointing_steps 200 --checkpoints_total_limit 2 --resume_from_checkpoint latest \
  --validation_prompts "${PROMPT:-a red apple on a wooden table, photograph}" \
  --validation_steps 200 --output_dir "$output" "$@"
