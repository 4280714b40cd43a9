#!/usr/bin/env bash
# Prove the project on a GPU, without a network: is training right on it, how fast is it, and in how
# much memory?
#     bash scripts/measure/gpu.sh [FOLDER]
#     REFERENCE=train_lcm_distill_lora_sdxl.py bash scripts/measure/gpu.sh    # and beside another's
# Weights are the demo's, or random in the official shapes. Meant for half an hour on one card, not
# yet tried on any. Sections that succeeded are kept in FOLDER (outputs/gpu), and the same command
# goes on with the others. Writes docs/gpu-<card>.md; exit code 1 if a section failed. Without a GPU
# the same programs run with tiny shapes, in ten minutes on two cores, and the page stays in FOLDER:
# a test of this script.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-outputs/gpu}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
card=$(python -c '
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")')
# Of each section: it may be older than the page
commit=$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)
failed=0 sections=()

# section NAME TITLE COMMAND ...: what the command prints is a section of the page
section() {
  local file=$folder/$1.md title=$2 status=0
  shift 2
  sections+=("$file")
  if [ -f "$file" ] && [ ! -f "$file.failed" ]; then return; fi
  echo "--- $title" >&2
  printf '\n## %s\n\n`%s`, commit %s\n\n' "$title" "${*//$PWD\//}" "$commit" >"$file"
  touch "$file.failed" # until it has succeeded
  "$@" | tee -a "$file" || status=$?
  if [ $status -eq 0 ]; then
    rm "$file.failed"
  else
    failed=1
    printf '\nThis command ended with exit code %s.\n' $status >>"$file"
  fi
}

measure=scripts/measure
if [ "$card" = cpu ]; then
  page=$folder/gpu-cpu.md
  small="--rounds 1 --steps 1"
  section right "Is it right?" python $measure/check_card.py --steps 5
  section speed-sd15 "Speed, SD 1.5's layout" python $measure/benchmark.py $small --batch 1 \
    --model demo/teacher-sd15 --options encoded trajectory_target --output_dir "$folder/speed-sd15"
  section speed-sdxl "Speed, SDXL's layout" python $measure/benchmark.py $small --batch 1 \
    --model demo/teacher-sdxl --options encoded trajectories --output_dir "$folder/speed-sdxl"
  section full-size "A step of a full-size UNet" python $measure/full_size.py sd15 \
    --mixed_precision no --work_dir "$folder"
  teacher=demo/teacher-sdxl images=demo/data
  shape="--resolution 128 --batch 1 --rounds 1 --seconds 1 --lora_rank 8"
else
  slug=$(echo "$card" | tr 'A-Z' 'a-z' | tr -cs 'a-z0-9' '-')
  page=docs/gpu-${slug%-}.md
  often="--precision fp16 --rounds 2 --steps 3"
  section right "Is it right?" python $measure/check_card.py
  section speed-sd15 "Speed, SD 1.5 at 512 px" python $measure/benchmark.py $often --model sd15 \
    --resolution 512 --batch 1 4 12 --options encoded encoded+torch_compile trajectories \
    trajectory_target --output_dir "$folder/speed-sd15"
  section speed-sdxl "Speed, SDXL at 1024 px" python $measure/benchmark.py $often --model sdxl \
    --resolution 1024 --batch 1 4 --options encoded encoded+torch_compile trajectories \
    trajectory_target --output_dir "$folder/speed-sdxl"
  section speed-sdxl-12 "Speed, SDXL at 1024 px, batch 12" python $measure/benchmark.py $often \
    --model sdxl --resolution 1024 --batch 12 --options encoded+gradient_checkpointing \
    trajectory_target+gradient_checkpointing --output_dir "$folder/speed-sdxl-12"
  section full-size "A step of a full-size UNet, the flags for 8 GB" python $measure/full_size.py \
    sdxl --mixed_precision fp16 --work_dir "$folder" -- --quantize_base nf4 --use_8bit_adam
  if [ ! -f "$folder/random/images/train.parquet" ]; then # the last thing it writes
    python $measure/random_teacher.py sdxl "$folder/random" --resolution 1024
  fi
  teacher=$folder/random/teacher images=$folder/random/images
  shape="--resolution 1024 --batch 4 --rounds 1 --mixed_precision fp16 --gradient_checkpointing"
fi
# The gains are reported, whatever they are
gains="0 0 0"
if [ -n "${REFERENCE:-}" ]; then gains="0 0 0 0"; fi
section programs "Whole programs, SDXL's layout" python $measure/compare_speed.py $shape \
  --teacher "$teacher" --dataset_name "$images" --trajectories --least $gains \
  ${REFERENCE:+--reference "$REFERENCE"}

{
  echo "# ${card/#cpu/A CPU, tiny shapes}"
  echo
  printf 'Written by `bash scripts/measure/gpu.sh`. '
  python -c '
import sys
sys.path.insert(0, "scripts")
from studio import provenance
print(provenance([]).split("\n\n")[1].partition(". ")[2].strip())'
  cat "${sections[@]}"
} >"$page"
echo "Written: $page"
exit $failed
