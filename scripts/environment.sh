# Sourced by the other scripts: makes .venv with Python 3.11 or newer and installs the pinned requirements once.
# A second call with the same requirements does nothing. DSNET_PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed.txt # What was installed from; written last, so that a killed installation starts again.
if ! cat requirements.txt pyproject.toml | cmp -s - "$stamp" || ! .venv/bin/python -c '' 2>/dev/null; then
  python=${DSNET_PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: '$python' is not Python 3.11 or newer: set DSNET_PYTHON to one that is" >&2
    exit 1
  fi
  echo "installing into .venv (a few minutes, 1.4 GB) ..."
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  cat requirements.txt pyproject.toml > "$stamp"
fi
