#!/usr/bin/env bash
# Train on the nodes of a Slurm job until the run is done, through time limits, preemptions and lost nodes.
# All options go to distgpt.train:
#   sbatch [--nodes=4 ...] slurm/train.sh gpt2-124m --data.path=data/owt
# Edit only the resources, here or as flags of sbatch. Some clusters want --partition, --account or --gpus-per-node=8.
#SBATCH --job-name=distgpt
#SBATCH --nodes=1
# Whole nodes with all their CPUs and GPUs. Memory is the cluster's default, usually all of it, or what you give sbatch as
# --mem=0 (all), --mem or --mem-per-cpu. If one of these were set here, sbatch would refuse the others.
#SBATCH --exclusive
#SBATCH --time=24:00:00
# So many seconds before the time limit, all ranks save and stop, and the job is requeued. It is also requeued after a
# preemption, a lost node and `scancel --signal=USR1 JOB`. A plain scancel ends it for good.
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Environment, to export or to give to sbatch:
#   DISTGPT_ENV=FILE      modules, a virtual environment or a container: see slurm/environment.sh
#   DISTGPT_SWEEP=FILE    with --array=0-N: line i, from 0, holds the flags of task i, in a run directory of its own
#   DISTGPT_HOME=DIR      the project, if it cannot be found by the path of this file
#   DISTGPT_PREFLIGHT=no  start without the checks of distgpt.doctor on jobs of several nodes
#   NPROC_PER_NODE=N      ranks on each node; the default is one for each GPU, or two on a node without GPUs
#   NUMA_BINDING=node     bind each rank to the CPUs near its GPU: see docs/gpu.md
#   TRIES=N               attempts in a row without a new checkpoint before the job gives up (5)
# slurm-JOB.out has the events of the job, RUN/logs/slurm-JOB/attempt-N/HOST.log the output of the ranks, and
# `squeue --me --format="%i %T %M %R %k"` shows step and ETA.
set -euo pipefail
: "${SLURM_JOB_ID:?submit this with sbatch}"
# Note a signal to stop that comes before environment.sh handles it.
stop_signal=USR1 stopped='' child=''
trap 'stopped=$SECONDS' USR1

# sbatch runs a copy of this file. Find the project by the command as it was submitted: the path may contain spaces, and
# options follow it.
home=${DISTGPT_HOME:-}
read -ra submitted < <(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p') || submitted=()
for ((words = 1; words <= ${#submitted[@]}; words++)); do
    file=$(cd "$SLURM_SUBMIT_DIR" && readlink -e -- "${submitted[*]:0:words}") || continue
    if [[ -z $home && $file == */slurm/train.sh ]]; then home=${file%/slurm/train.sh}; fi
done
[[ -r ${home:=$SLURM_SUBMIT_DIR}/slurm/environment.sh ]] || {
    echo "distgpt: error: $home is not the project: submit from its directory, or set DISTGPT_HOME to it" >&2
    exit 2
}
. "$home/slurm/environment.sh"
require_python
# Check the job before any rank starts, so that a mistake gives one line, and get the variables below.
DISTGPT_SLURM_NODE=$(scontrol show node "$SLURMD_NODENAME") || DISTGPT_SLURM_NODE=
export DISTGPT_SLURM_NODE
run_dir='' steps='' attempt_logs='' newest='' address='' rendezvous_file='' options=()
variables=$("${python[@]}" -m distgpt.launch slurm attempt "$@")
eval "${variables##*$'\n'}"
set -- "${options[@]}"

# update_comment: show step, loss and ETA as the comment of the job, once there are any.
update_comment() {
    local line
    line=$("${python[@]}" -m distgpt.launch slurm progress "$run_dir" "$steps" 2>/dev/null) || return 0
    line=${line##*$'\n'}
    [[ -z $line ]] || scontrol update "JobId=$job" "Comment=$line" 2>/dev/null || true
}

# One task for each node. Without --cpu-bind=none, a cluster that binds tasks to CPUs would give the task only one.
srun_each_node=(srun --quiet --export=ALL --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)
if [[ $(scontrol show config) =~ TaskPlugin[\ =]+[a-z/,]*(affinity|cgroup) ]]; then srun_each_node+=(--cpu-bind=none); fi

# require_shared_directory: end the job if a node cannot write its log because it does not see the run directory.
require_shared_directory() {
    local nodes_without_it
    # shellcheck disable=SC2016 # the other shell expands them
    # Ten times, since a network file system may show a new directory late.
    nodes_without_it=$("${srun_each_node[@]}" bash -c 'for _ in {1..10}; do
            if { : >>"$1/$SLURMD_NODENAME.log"; } 2>/dev/null; then exit; fi
            sleep 1
        done
        echo "$SLURMD_NODENAME"' bash "$attempt_logs") || true
    [[ -z $nodes_without_it ]] ||
        fail 73 "${nodes_without_it//$'\n'/, } cannot write in $attempt_logs: --run.dir must lie on a file system that all nodes share"
}

# run_on_all_nodes MODULE [OPTION ...]: run the module under torchrun. If it fails, end the job, or requeue it.
run_on_all_nodes() {
    local status=0 code="" cause="" ending
    # The next port that is free on this node, which is the first one.
    if [[ -z $rendezvous_file ]]; then
        while port=$((port + 1)) && (: <"/dev/tcp/$address/$port") 2>/dev/null; do :; done
    fi
    export RENDEZVOUS_ENDPOINT=${rendezvous_file:-$address:$port} RENDEZVOUS_ID=$SLURM_JOB_ID.$attempt.$1
    # The first rank that knows why the attempt ends writes this file.
    DISTGPT_EXIT_FILE=$(realpath "$attempt_logs")/exit.json
    export DISTGPT_EXIT_FILE
    rm -f "$DISTGPT_EXIT_FILE"
    # --kill-on-bad-exit and --wait: if the module ends on one node, end it on all. --gpus-per-node: a step does not get the
    # GPUs of an exclusive job by itself.
    supervise "${srun_each_node[@]}" ${SLURM_GPUS_ON_NODE:+"--gpus-per-node=$SLURM_GPUS_ON_NODE"} \
        --kill-on-bad-exit=1 --wait=60 bash "$home/slurm/node.sh" "$attempt_logs" "$@" || status=$?
    ending=$("${python[@]}" -m distgpt.launch slurm ending "$attempt_logs" "$run_dir" "$steps" "$1" "$status") || ending=
    read -r code cause <<<"${ending##*$'\n'}"
    case $code in
        0) ;;
        75 | "") requeue "${cause:-no rank could report how it ended, see $attempt_logs}" ;;
        *) fail "$code" "$cause" ;;
    esac
}

# Other jobs, and earlier attempts of this one, start at another port.
port=$((10000 + (SLURM_JOB_ID * 101 + attempt * 7) % 20000))
say "attempt $attempt from $newest on $SLURM_JOB_NODELIST: tail -F $(printf %q "$attempt_logs")/*.log"
commenter=''
trap 'rm -f "$rendezvous_file"; kill $commenter 2>/dev/null || true; update_comment || true' EXIT
if ((SLURM_NNODES > 1)); then
    require_shared_directory
    [[ ${DISTGPT_PREFLIGHT:-yes} == no ]] || run_on_all_nodes distgpt.doctor --distributed "$@"
fi
# Update the comment often at first, later every five minutes, since each update starts a Python.
for ((pause = 2; ; pause = pause < 300 ? 2 * pause : 300)); do sleep "$pause" && update_comment; done &
commenter=$!
run_on_all_nodes distgpt.train "$@"
say "done: $run_dir is at $(basename "$(printf '%s\n' "$run_dir"/checkpoints/step-* | tail -n 1)")"
