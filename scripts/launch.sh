# Sourced by the launchers: names with "~", the card's settings, the output folder, the run.
trainers=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for name in DATA DATASET MODEL VAE OUTPUT; do # in quotes a shell leaves "~" as it is
  case ${!name:-} in "~" | "~/"*) printf -v "$name" %s "$HOME${!name:1}" ;; esac
done
unset "${!ACCELERATE_@}" # what these launchers print is what is used
export -n RANK # of the LoRA: PyTorch's number of a process has this name too

# The flag for DATA: a folder of images, tar shards, else a dataset's folder or name.
data() {
  local images='.*\.(jpe?g|png|webp|bmp|gif|tiff?|avif|heic|jxl)'
  if [ -f "$1/encoded.json" ] || [ -f "$1/state.json" ] || [ -f "$1/dataset_dict.json" ]; then
    echo --dataset_name # encoded, or saved by `datasets`
  elif [ -d "$1" ]; then
    if [ -f "$1/metadata.jsonl" ] || [ -f "$1/metadata.csv" ] || holds "$1" "$images"; then
      echo --train_data_dir
    elif holds "$1" '.*\.tar'; then
      echo --train_shards_path_or_url
    elif holds "$1" '.*\.parquet'; then
      echo --dataset_name
    else
      echo --train_data_dir # which says what is not there
    fi
  else
    case $1 in
    *.tar | *.tar[?]* | *://* | pipe:*) echo --train_shards_path_or_url ;;
    *) echo --dataset_name ;;
    esac
  fi
}
# How the images are cut; encoded data know how theirs were, and what else a run must have too.
crop() {
  local stamp="$1/encoded.json"
  [ -f "$stamp" ] || stamp=/dev/null
  ! grep -q '"center_crop": true' "$stamp" || echo --center_crop
  grep -qE '"random_flip": false|"generated"|"trajectories"' "$stamp" || echo --random_flip
  sed -nE 's/^ *"(resolution|num_ddim_timesteps)": ([0-9]+),?$/--\1 \2/p' "$stamp"
}
# Whether MODEL is a teacher folder of make_teacher.py, which has the VAE that its owner wants.
own_vae() { [ -f "$1/recipe.json" ]; }
# Whether a folder has a file with such a name, at any depth; small and capital letters alike.
holds() { [ -n "$(find -L "$1" -type f 2>/dev/null | grep -Eix -m1 -- "$2")" ]; }

# MODEL as a part of a folder's name that no other model has: a hub id as the hub's cache writes it,
# of a path the last name and a checksum of the whole.
model_name() {
  local path=${1%"${1##*[!/]}"} name
  if [ -d "$path" ]; then
    path=$(cd "$path" && pwd -P)
  elif [ -e "$path" ]; then
    path=$(cd "$(dirname "$path")" && pwd -P)/${path##*/}
  elif [[ $path =~ ^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)?$ ]]; then
    echo "${path/\//--}"
    return
  fi
  name=${path##*/} name=${name%.safetensors}
  echo "${name//[^A-Za-z0-9._-]/-}-$(printf %s "$path" | cksum | cut -d' ' -f1)"
}

# The memory of the first GPU in units of 10^9 bytes; 0 without one.
gpu_memory() {
  python -c '
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is no traceback
try:
    import torch
except ImportError:
    raise SystemExit("PyTorch is not installed: pip install -r requirements.txt") from None
cuda = torch.cuda
print(cuda.get_device_properties(0).total_memory // 10**9 if cuda.is_available() else 0)'
}

# card GB "BATCH FLAGS" ...: sets `batch`, `accumulation` and `saving` to those of the largest card
# that is not larger than ours, or than CARD; `precision` to fp16 on a GPU, to nothing without one.
card() {
  local name size=$1 where="no GPU found" # a CPU takes the batch of the first card
  CARD=${CARD:-$(gpu_memory)}
  for name in CARD BATCH_SIZE ACCUMULATION; do
    if [[ ! ${!name:-1} =~ ^(0|[1-9][0-9]*)$ ]]; then
      echo "$name=${!name}: give a whole number, as CARD the GPU's memory in GB" >&2
      exit 1
    fi
  done
  read -r batch saving <<<"$2"
  while [ $# -gt 1 ] && [ "$CARD" -ge "$1" ]; do
    size=$1
    read -r batch saving <<<"$2"
    shift 2
  done
  precision=
  if [ "$CARD" -eq 0 ]; then saving=; else where="a GPU of $size GB" precision=fp16; fi
  batch=${BATCH_SIZE:-$batch} precision=${MIXED_PRECISION:-$precision}
  accumulation=${ACCUMULATION:-$((batch > 0 ? (11 + batch) / batch : 1))}
  about="settings for $where: batch $batch x $accumulation, ${precision:-float32}"
}

# Say what is about to run and run it in place of this shell, so that Ctrl-C and other signals are
# the trainer's; with DRY_RUN=1 only print the command.
run() {
  echo "$model, $about; output in $output" >&2
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@" && echo; else exec "$@"; fi
}
