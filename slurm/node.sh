#!/usr/bin/env bash
# What slurm/train.sh runs on each node of the job: a module under torchrun, with a rank for each GPU that Slurm gave, or
# two that share the CPUs.
#   node.sh LOGS MODULE [OPTION ...]
set -euo pipefail
exec >>"$1/$SLURMD_NODENAME.log" 2>&1
shift
home=$(CDPATH='' cd -- "$(dirname "$0")/.." && pwd)
. "$home/slurm/environment.sh"

gpus=${SLURM_GPUS_ON_NODE:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
cpus=${SLURM_CPUS_ON_NODE:-1}
ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : cpus > 1 ? 2 : 1))}

# Threads of a rank: its share of the CPUs that Slurm gave, not of all that the node has.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > ranks ? cpus / ranks : 1))}
# Both libraries would else pick an interface by the host's name, on some clusters a loopback or management network.
# NCCL only bootstraps over it and finds InfiniBand by itself.
address=$(own_address)
interface=$(ip -o -4 address show to "$address" 2>/dev/null | awk 'NR == 1 { print $2 }') || interface=
if [[ -n $interface ]]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
fi
# Says what went wrong where NCCL would only return an error; costs nothing while nothing does.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# is_host and --local-addr: torchrun compares host names to find out who it is, which fails where they do not resolve.
# read_timeout: from a busy network file system Python starts minutes later on one node than on another.
# The shutdown timeout is the time to finish a step and save it in, before SIGKILL.
exec "${python[@]}" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$ranks" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS_ENDPOINT" --rdzv-id="$RENDEZVOUS_ID" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0)),read_timeout=600" --local-addr="$address" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=150 \
    -m "$@"
