#!/usr/bin/env bash
# Installs what is missing into .venv, then runs the linter and the tests. Arguments go to pytest:
#   ./scripts/test.sh tests/ops -k gradient
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal "$@"
