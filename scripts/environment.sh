# Sourced by other scripts: makes and enters a virtual environment in .venv with the named
# requirements files installed.
#     source scripts/environment.sh requirements.txt [more.txt ...]
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "Python 3.10 or newer is needed" >&2
  exit 1
}
[ -x .venv/bin/python ] || python3 -m venv .venv
source .venv/bin/activate
echo "installing $* into .venv"
python -m pip install --quiet --disable-pip-version-check "${@/#/--requirement=}"
