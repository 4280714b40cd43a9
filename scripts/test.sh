#!/usr/bin/env bash
# Install what the tests need and run them: scripts/test.sh [--slow] [pytest arguments]
# Without --slow: 15 minutes or less on two cores. With it: the long tests as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt tests/requirements.txt
if [ "${1:-}" = --slow ]; then
  shift
  exec python -m pytest "$@"
fi
exec python -m pytest -m "not slow" "$@"
