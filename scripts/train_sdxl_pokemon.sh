#!/usr/bin/env bash
# The recipe lcm_xl_lora_pokemon_blip of diffengine, on captioned images, on a GPU of 12 GB or more:
#     DATASET=someone/captioned-images bash scripts/train_sdxl_pokemon.sh [arguments of the trainer]
# DATASET is what DATA is for train_sdxl.sh. Rank 8, alpha 8, learning rate 1e-5, 8-bit AdamW
# without weight decay, fp16, batch 2 x accumulation 2, 50 epochs, Huber. The recipe computes text
# embeddings once: to have that too, let scripts/encode_data.py encode the dataset and give its
# folder as DATASET. The dataset it was made for is no longer available. Not run on the real weights
# yet. DRY_RUN=1 prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
: "${DATASET:?give DATASET=folder of images with captions, or a dataset\'s name}"
model=${MODEL:-stabilityai/stable-diffusion-xl-base-1.0}
output=${OUTPUT:-outputs/lcm_xl_lora_pokemon_blip-$(model_name "$model")}
vae=${VAE-madebyollin/sdxl-vae-fp16-fix}
BATCH_SIZE=2 ACCUMULATION=2
card 12 "2 --gradient_checkpointing"

run python "$trainers/train_lcm_lora_sdxl.py" --pretrained_teacher_model "$model" \
  ${vae:+--pretrained_vae_model_name_or_path "$vae"} \
  "$(data "$DATASET")" "$DATASET" --resolution 1024 $(crop "$DATASET") \
  --dataloader_num_workers 4 --vae_encode_batch_size 1 \
  ${precision:+--mixed_precision "$precision"} --lora_rank 8 --lora_alpha 8 \
  --learning_rate 1e-5 --use_8bit_adam --adam_weight_decay 0 --num_train_epochs 50 \
  --train_batch_size "$batch" --gradient_accumulation_steps "$accumulation" $saving \
  --loss_type huber --w_min 3 --w_max 15 --phases 1 \
  --checkpointing_steps 1000 --checkpoints_total_limit 2 --resume_from_checkpoint latest \
  --validation_prompts "yoda pokemon" "yoda pokemon" "yoda pokemon" "yoda pokemon" \
  --validation_steps 1000 --output_dir "$output" "$@"
