#!/usr/bin/env bash
# From nothing to an image: install, distil a demo teacher into an LCM-LoRA, compare the two.
#     bash scripts/quickstart.sh [sd15 | sdxl] [more arguments of the trainer]
# Two CPU cores and no GPU are enough: five minutes (docs/results.md), downloads apart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
family=sd15
case "${1:-}" in sd15 | sdxl) family=$1 && shift ;; esac
source scripts/environment.sh requirements.txt
out=${OUTPUT_DIR:-outputs/quickstart-$family}

python "train_lcm_lora_$family.py" --mixed_precision no \
  --pretrained_teacher_model "demo/teacher-$family" --dataset_name demo/data \
  --lora_rank 32 --learning_rate 1e-3 --lr_scheduler cosine \
  --w_min 3 --w_max 3 --loss_units output --train_batch_size 16 --max_train_steps 600 \
  --checkpointing_steps 300 --checkpoints_total_limit 1 \
  --validation_prompts "television, fluent 3D style" "horse, noto style" \
  --validation_steps 300 \
  --report_to tensorboard --resume_from_checkpoint latest --output_dir "$out" "$@"

# The first captions of a seeded shuffle that are each of another category
python infer.py --lora "$out" --compare --output "$out/compare.png" --overwrite --prompt \
  "television, fluent 3D style" "horse, noto style" "fairy, fluent flat style" \
  "fondue, fluent flat style" "grinning face, fluent 3D style" "pen, fluent 3D style" \
  "building construction, noto style" "coat, noto style"
echo "Done. The LoRA: $out/pytorch_lora_weights.safetensors  The images: $out/compare.png"
