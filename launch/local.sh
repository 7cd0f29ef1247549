#!/usr/bin/env bash
# Train on all devices of this machine: every GPU, or two ranks that share the CPU's cores.
#   launch/local.sh [PRESET] [--section.key=value ...]
# NPROC_PER_NODE=N sets the number of ranks. A rank that dies or hangs costs the steps since the last checkpoint: all start
# again, until TRIES (3) launches in a row got no further. Exits with the code of the run (0 done, 2 usage, 75 interrupted:
# run it again, ...), which torchrun would flatten to 1.
. "$(dirname "$0")/environment.sh"
environment ""
exec python -m distgpt.launch local "$@"
