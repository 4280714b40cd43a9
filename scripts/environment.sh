# Sourced by other scripts: makes and enters a virtual environment in .venv with the named
# requirements files installed.
#     source scripts/environment.sh requirements.txt [more.txt ...]
is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if ! is_new .venv/bin/python; then # none yet, or of an older Python
  for python in python3 python3.13 python3.12 python3.11 none; do is_new "$python" && break; done
  if [ "$python" = none ]; then
    echo "Python 3.11 or newer is needed: the pinned packages have no older one" >&2
    exit 1
  fi
  "$python" -m venv --clear .venv
fi
source .venv/bin/activate
echo "installing $* into .venv"
python -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}"
