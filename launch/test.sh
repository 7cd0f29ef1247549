#!/usr/bin/env bash
# Run everything that must hold: lint, types, tests. Options go to pytest.
#   launch/test.sh [pytest options]
. "$(dirname "$0")/environment.sh"
environment test

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
