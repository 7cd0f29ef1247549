#!/usr/bin/env bash
# Run everything that must hold: lint, types, tests. Options go to pytest; --storms runs the storms at their full length.
#   launch/test.sh [pytest options]
. "$(dirname "$0")/environment.sh"
environment test
cd "$home"

ruff check .
ruff format --check .
mypy
# Two at a time, since most of the tests wait for processes to start; those of a directory stay together.
python -m pytest --numprocesses=2 --dist=loadscope --no-loadscope-reorder "$@"
