# Sourced by the other scripts: makes .venv with Python 3.11 or newer and installs the pinned requirements once.
# A second call with the same requirements does nothing; with others it installs what differs, and leaves what a user
# has added to .venv. DSNET_PYTHON names another interpreter than python3 to make .venv with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # Without bytecode every process compiles what it imports: 8 seconds in place of none.

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
install() {
  .venv/bin/uv pip install --quiet --python .venv/bin/python "$@" && return
  echo "uv could not install, see above: now with pip, which may have settings of its own for this machine ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}
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
  echo "installing into .venv (if it is new, a minute and 1.5 GB) ..."
  rm -f "$stamp"
  # uv takes a fifth of pip's time; its own lines in requirements.txt say which one.
  sed -n '/^uv==/,/[^\\]$/p' requirements.txt > .venv/uv.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.txt
  install --require-hashes -r requirements.txt
  install --no-deps --no-build-isolation --editable .
  cat requirements.txt pyproject.toml > "$stamp"
fi
