#!/usr/bin/env bash
# What slurm/train.sh runs on each node of the job: a module under torchrun, see distgpt/launch/slurm.py.
#   node.sh LOGS MODULE [OPTION ...]
set -euo pipefail
exec >>"$1/$SLURMD_NODENAME.log" 2>&1
shift
home=$(CDPATH='' cd -- "$(dirname "$0")/.." && pwd)
. "$home/slurm/environment.sh"
DISTGPT_SLURM_NODE=$(scontrol show node "$SLURMD_NODENAME") || DISTGPT_SLURM_NODE=
export DISTGPT_SLURM_NODE
exec "${python[@]}" -m distgpt.launch slurm node "$@"
