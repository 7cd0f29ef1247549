#!/usr/bin/env bash
# Train several runs on this machine, one after the other: each line of FILE has the flags of one.
#   launch/sweep.sh FILE [PRESET] [--section.key=value ...]
# The options after FILE are common to all. A line that names no --run.dir gets one of its own, as in an array of Slurm.
# Runs that are done are skipped, and those that were interrupted go on. A line that fails does not stop those after it. One
# signal to stop ends the sweep once the run in progress is saved (75). NPROC_PER_NODE, NUMA_BINDING and TRIES are those of
# local.sh.
# Exits with 0, or with the code of the first run that failed.
. "$(dirname "$0")/environment.sh"
environment ""
exec python -m distgpt.launch sweep "$@"
