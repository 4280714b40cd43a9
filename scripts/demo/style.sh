#!/usr/bin/env bash
# The LCM-LoRA as a universal module: add the quickstart's, untrained, to a style LoRA and a
# fine-tuned teacher.
#     bash scripts/demo/style.sh [more arguments of scripts/demo/evaluate_style.py]
# Trains both on the demo's Twemoji images, which the LCM-LoRA never saw, then measures, and
# generates images: outputs/style. Ends with exit code 0 if in 4 steps the LCM-LoRA is closer to the
# style than DPM-Solver++ at the report's guidance of 7.5.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/environment.sh requirements.txt scripts/requirements-eval.txt
lora=${LORA:-outputs/quickstart-sd15}
[ -f "$lora/pytorch_lora_weights.safetensors" ] || bash scripts/quickstart.sh

python scripts/demo/train_style_lora.py --output_dir outputs/style-lora
python scripts/demo/train_style_lora.py --full --learning_rate 2e-4 \
  --output_dir outputs/style-teacher
# The figure and the table, whose intervals are wide; then the judged comparison, 4 steps, with
# twice the captions.
python scripts/demo/evaluate_style.py --lora "$lora" --style_lora outputs/style-lora \
  --fine_tune outputs/style-teacher --output_dir outputs/style "$@" || [ $? = 1 ]
python scripts/demo/evaluate_style.py --lora "$lora" --style_lora outputs/style-lora \
  --fine_tune outputs/style-teacher --num_prompts 500 --steps 4 --guidance 4 \
  --output_dir outputs/style-500 "$@"
