# Sourced by the launchers: `data NAME` gives the flag for a folder of images or a dataset's name,
# `run COMMAND` runs a command, or with DRY_RUN=1 prints it.
trainers=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data() {
  if [ -f "$1/metadata.jsonl" ] || [ -f "$1/metadata.csv" ]; then
    echo --train_data_dir
  else
    echo --dataset_name
  fi
}
run() {
  if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
