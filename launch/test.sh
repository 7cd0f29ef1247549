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
workers=--workers=6
case ${1:-} in
    "" | --storms | --storm-seed*) ;;
    --fast) set -- -m "not slow" ;;
    *) exec python -m pytest "$@" ;;
esac
ruff check .
ruff format --check .
# Beside the tests, which one process collects before others run them.
mypy &
types=$! failed=0
python -m pytest "$workers" "$@" || failed=$?
wait "$types"
exit "$failed"
