#!/usr/bin/env bash
# Run everything that must hold: lint, types, tests. Options go to pytest; --storms runs the storms at their full length.
#   launch/test.sh [pytest options]
. "$(dirname "$0")/environment.sh"
environment test
cd "$home"

ruff check .
ruff format --check .
mypy
# More than there are cores, since many tests wait.
python -m pytest --numprocesses=4 --dist=loadscope --no-loadscope-reorder "$@"
