#!/usr/bin/env bash
# Distil SSD-1B, the half-size SDXL, on one GPU of 8 GB or more, with the command and variables of
# train_sdxl.sh:
#     DATA=my_images bash scripts/train_ssd1b.sh [more arguments of the trainer]
set -euo pipefail
family=ssd1b MODEL=${MODEL:-segmind/SSD-1B}
source "$(dirname "${BASH_SOURCE[0]}")/train_sdxl.sh"
