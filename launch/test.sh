#!/usr/bin/env bash
# Run all checks: lint, types, tests.
#   launch/test.sh                     everything; --storms runs the storms at their full length
#   launch/test.sh --fast              lint, types and the tests that start no training: under a minute
#   launch/test.sh -k NAME, or a file  only those tests, with any options of pytest
#   DISTGPT_TORCH=2.11.0 launch/test.sh  the same with another torch, in an environment of its own
. "$(dirname "$0")/environment.sh"
environment test
cd "$home"

# Hundreds of processes import the same modules: keep their bytecode.
unset PYTHONDONTWRITEBYTECODE
# More workers than cores, since many tests wait.
workers=(--numprocesses=6 --dist=loadscope --no-loadscope-reorder)
case ${1:-} in
    "" | --storms | --storm-seed*) ;;
    --fast) set -- -m "not slow" ;;
    *) exec python -m pytest --numprocesses=0 "$@" ;;
esac
ruff check .
ruff format --check .
mypy
python -m pytest "${workers[@]}" "$@"
