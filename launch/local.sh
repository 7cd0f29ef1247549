#!/usr/bin/env bash
# Train on all devices of this machine: every GPU, or two ranks that share the CPU's cores.
#   launch/local.sh [PRESET] [--section.key=value ...]
# NPROC_PER_NODE=N sets the number of ranks. If a rank dies or hangs, all ranks start again from the newest checkpoint, until
# TRIES (3) launches in a row made no new checkpoint. Exits with the code of the run (0 done, 2 usage, 75 interrupted: run
# it again, ...), which torchrun would turn into 1. NUMA_BINDING=node binds each rank to the CPUs near its GPU (docs/gpu.md).
. "$(dirname "$0")/environment.sh"
environment ""
exec python -m distgpt.launch local "$@"
