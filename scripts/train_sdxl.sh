#!/usr/bin/env bash
# Distil SDXL, or a fine-tune of it, on one GPU of 8 GB or more:
#     DATA=my_images bash scripts/train_sdxl.sh [more arguments of the trainer]
# DATA is a folder of images with their captions, encoded data, tar shards or a dataset's name. The
# batch, always 12 images a step, and what saves memory are those for your card
# (docs/memory-and-speed.md). Rank, rate and loss are those of published LCM-LoRA recipes; nothing
# here has been run on the real weights yet. Variables change the settings below; CARD=12 is a GPU
# of 12 GB, VAE= the teacher's own VAE, the default where make_teacher.py made the teacher.
# DRY_RUN=1 prints the command.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
: "${DATA:?give DATA=folder of images with captions, or a dataset\'s name}"
family=${family:-sdxl} model=${MODEL:-stabilityai/stable-diffusion-xl-base-1.0}
output=${OUTPUT:-outputs/lcm-lora-$family-$(model_name "$model")}
own_vae "$model" || VAE=${VAE-madebyollin/sdxl-vae-fp16-fix}
vae=${VAE-}
GC=--gradient_checkpointing
if [ "$family" = ssd1b ]; then
  card 8 "1 $GC --use_8bit_adam" 12 "4 $GC" 16 "6 $GC" 24 "12 $GC" 48 "6"
else
  card 8 "1 $GC --use_8bit_adam --quantize_base nf4" 12 "2 $GC" 16 "4 $GC" 24 "12 $GC" \
    48 "4" 80 "6"
fi

run python "$trainers/train_lcm_lora_sdxl.py" --pretrained_teacher_model "$model" \
  ${vae:+--pretrained_vae_model_name_or_path "$vae"} \
  "$(data "$DATA")" "$DATA" --resolution "${RESOLUTION:-1024}" $(crop "$DATA") \
  --dataloader_num_workers 4 --train_batch_size "$batch" \
  --gradient_accumulation_steps "$accumulation" --vae_encode_batch_size 1 $saving \
  ${precision:+--mixed_precision "$precision"} --allow_tf32 --lora_rank "${RANK:-64}" \
  --learning_rate "${LEARNING_RATE:-1e-4}" --max_train_steps "${STEPS:-1000}" \
  --checkpointing_steps 200 --checkpoints_total_limit 2 --resume_from_checkpoint latest \
  --validation_prompts "${PROMPT:-a red apple on a wooden table, photograph}" \
  --validation_steps 200 --output_dir "$output" "$@"
