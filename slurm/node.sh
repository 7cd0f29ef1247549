#!/usr/bin/env bash
# Run a module under torchrun on one node of a job: slurm/train.sh starts this on each node. See distgpt/launch/slurm.py.
#   node.sh LOGS MODULE [OPTION ...]
set -euo pipefail
exec >>"$1/$SLURMD_NODENAME.log" 2>&1
shift
home=$(CDPATH='' cd -- "$(dirname "$0")/.." && pwd)
. "$home/slurm/environment.sh"
DISTGPT_SLURM_NODE=$(scontrol show node "$SLURMD_NODENAME") || DISTGPT_SLURM_NODE=
export DISTGPT_SLURM_NODE
exec "${python[@]}" -m distgpt.launch slurm node "$@"
