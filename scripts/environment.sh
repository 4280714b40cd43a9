# Sourced by other scripts: makes and enters a virtual environment in .venv with the named
# requirements files installed.
#     source scripts/environment.sh requirements.txt [more.txt ...]
# PYTHON names the Python that a new one is made with.
fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
has_pip() { "$1" -m pip --version >/dev/null 2>&1; }
if ! fits .venv/bin/python || ! has_pip .venv/bin/python; then # none, an older one, half made
  for python in ${PYTHON:-python3 python python3.14 python3.13 python3.12 python3.11} ""; do
    if fits "$python" && "$python" -c 'import ensurepip' 2>/dev/null; then break; fi
  done
  if [ -z "$python" ]; then
    echo "Python 3.11 or newer with its venv module is needed (Debian, Ubuntu: python3-venv);" \
      "tried ${PYTHON:-python3 and python3.11 to python3.14}" >&2
    exit 1
  fi
  echo "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
fi
# Not by bin/activate, which names the folder that it was made in, before it moved
unset PYTHONHOME
export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
echo "installing $* into .venv"
python -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}"
