# Sourced by the other scripts: makes .venv with Python 3.11 or newer and installs the pinned requirements once.
# A second call with the same requirements does nothing; with others it installs what differs, and leaves what a user
# has added to .venv. DSNET_PYTHON names another interpreter than python3 to make .venv with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

python=${DSNET_PYTHON:-python3}
if ! new_enough .venv/bin/python || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  if ! new_enough "$python"; then
    echo "error: '$python' is not Python 3.11 or newer: set DSNET_PYTHON to one that is" >&2
    exit 1
  fi
  echo "making .venv ..."
  "$python" -m venv --clear .venv
elif [[ -n ${DSNET_PYTHON:-} && $(version "$DSNET_PYTHON") != "$(version .venv/bin/python)" ]]; then
  echo "error: .venv has Python $(version .venv/bin/python), DSNET_PYTHON is another: unset it, or remove .venv" >&2
  exit 1
fi

stamp=.venv/installed.txt # What was installed from; written last, so that a killed installation starts again.
if ! cat requirements.txt pyproject.toml | cmp -s - "$stamp"; then
  echo "installing into .venv (if it is new, a few minutes and 1.4 GB) ..."
  rm -f "$stamp"
  # Without compiling: that takes half of the time, most of it for modules that nobody imports.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  cat requirements.txt pyproject.toml > "$stamp"
fi
