#!/usr/bin/env bash
# Install what the tests need and run them: scripts/test.sh [--slow] [--gpu] [pytest arguments]
# Without --slow: 15 minutes or less on two cores. With it: then the long tests as well.
# --gpu is an option of the tests: a GPU, which is hidden without it, is used where they can.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
slow=
if [ "${1:-}" = --slow ]; then slow=1 && shift; fi
source scripts/environment.sh requirements.txt tests/requirements.txt
python -m pytest --numprocesses 2 --dist worksteal -m "not slow" "$@"
[ -z "$slow" ] || python -m pytest -m slow "$@"
