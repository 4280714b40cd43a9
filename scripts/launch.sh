# Sourced by the launchers: `data NAME` gives the flag for a folder of images, or for a dataset's
# name or folder (parquet, saved, encoded), `run COMMAND` runs a command, or with DRY_RUN=1 prints
# it.
trainers=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data() {
  if [ -d "$1" ] && [ -z "$(find "$1/" -maxdepth 2 \( -name '*.parquet' -o -name '*.arrow' \
    -o -name encoded.json \) -print -quit)" ]; then
    echo --train_data_dir
  else
    echo --dataset_name
  fi
}
run() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
