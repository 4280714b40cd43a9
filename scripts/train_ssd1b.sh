#!/usr/bin/env bash
# Distil SSD-1B, the half-size SDXL, on one GPU, with the command and variables of train_sdxl.sh:
#     DATA=my_images bash scripts/train_ssd1b.sh [more arguments of the trainer]
set -euo pipefail
export MODEL="${MODEL:-segmind/SSD-1B}" OUTPUT="${OUTPUT:-outputs/lcm-lora-ssd1b}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_sdxl.sh" "$@"
