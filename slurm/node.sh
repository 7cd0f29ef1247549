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
# Says what went wrong where NCCL would only return an error; costs nothing while nothing does.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# torchrun's rendezvous c10d unpickles what it reads from its store, so anyone who can write there can run code. On one node
# the store is therefore a private file, and the job listens on loopback only: the ranks have a store of their own. On
# several nodes the static rendezvous is used, which reads no pickles.
if ((SLURM_NNODES == 1)); then
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # Each keep-alive makes the file longer.
    rendezvous=(--rdzv-backend=c10d --rdzv-conf="store_type=file,keep_alive_interval=3600" --local-addr=127.0.0.1)
else
    # Both libraries would otherwise pick an interface by the host's name, on some clusters a loopback or management network.
    # NCCL only bootstraps over it and finds InfiniBand by itself.
    address=$(own_address)
    interface=$(ip -o -4 address show to "$address" 2>/dev/null | awk 'NR == 1 { print $2 }') || interface=
    if [[ -n $interface ]]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
    fi
    # timeout: on a busy network file system Python may start minutes later on one node than on another.
    rendezvous=(--rdzv-backend=static --rdzv-conf="timeout=600" --node-rank="$SLURM_NODEID")
fi

# The seconds that ranks have to finish a step and save it once they are told to stop; torchrun kills them after 30 by
# default.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}
exec "${python[@]}" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$ranks" --max-restarts=0 \
    "${rendezvous[@]}" --rdzv-endpoint="$RENDEZVOUS_ENDPOINT" --rdzv-id="$RENDEZVOUS_ID" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m "$@"
