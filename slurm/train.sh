#!/usr/bin/env bash
# Train on the nodes of a Slurm job until the run is done, however many time limits, preemptions and lost nodes it takes.
# All options go to distgpt.train:
#   sbatch [--nodes=4 ...] slurm/train.sh gpt2-124m --data.path=data/owt
# Only resources are to edit, here or as flags of sbatch; some clusters want --partition, --account or --gpus-per-node=8.
#SBATCH --job-name=distgpt
#SBATCH --nodes=1
# Whole nodes with all their CPUs and GPUs. Memory is the cluster's default, all of it as a rule, or what --mem=0 (all),
# --mem or --mem-per-cpu asks for: with one of them here sbatch would refuse another.
#SBATCH --exclusive
#SBATCH --time=24:00:00
# This long before the time limit all ranks save and leave and the job goes back into the queue, as it does after a
# preemption, a lost node and `scancel --signal=USR1 JOB`. A plain scancel ends it for good.
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Environment, to export or to give to sbatch:
#   DISTGPT_ENV=FILE      modules, a virtual environment or a container: see slurm/environment.sh
#   DISTGPT_SWEEP=FILE    with --array=0-N: line i, from 0, holds the flags of task i, in a run directory of its own
#   DISTGPT_HOME=DIR      the project, where it cannot be found from the place of this file
#   DISTGPT_PREFLIGHT=no  start without the checks of distgpt.doctor on jobs of several nodes
#   NPROC_PER_NODE=N      ranks on each node; the default is one a GPU, or two on a node without GPUs
#   TRIES=N               attempts in a row without a new checkpoint before the job gives up (5)
# slurm-JOB.out tells what became of the job, RUN/logs/slurm-JOB/attempt-N/HOST.log what the ranks say, and
# `squeue --me --format="%i %T %M %R %k"` shows step and ETA.
set -euo pipefail
: "${SLURM_JOB_ID:?submit this with sbatch}"
# Told to stop before environment.sh is there to pass it on.
stop_signal=USR1 stopped='' child=''
trap 'stopped=$SECONDS' USR1

# sbatch runs a copy of this file; Slurm remembers its name as it was given, with the options after it.
home=${DISTGPT_HOME:-}
read -ra typed < <(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p') || typed=()
for ((words = 1; words <= ${#typed[@]}; words++)); do
    file=$(cd "$SLURM_SUBMIT_DIR" && readlink -e -- "${typed[*]:0:words}") || continue
    if [[ -z $home && $file == */slurm/train.sh ]]; then home=${file%/slurm/train.sh}; fi
done
[[ -r ${home:=$SLURM_SUBMIT_DIR}/slurm/environment.sh ]] || {
    echo "distgpt: error: $home is not the project: submit from its directory, or set DISTGPT_HOME to it" >&2
    exit 2
}
. "$home/slurm/environment.sh"
require_python
# A mistake is one line here, before any rank starts.
DISTGPT_SLURM_NODE=$(scontrol show node "$SLURMD_NODENAME") || DISTGPT_SLURM_NODE=
export DISTGPT_SLURM_NODE
run_dir='' steps='' mine='' newest='' address='' rendezvous_file='' options=()
variables=$("${python[@]}" -m distgpt.launch slurm attempt "$@")
eval "${variables##*$'\n'}"
set -- "${options[@]}"

# comment: show the newest training line, where there is one, as the job's comment.
comment() {
    local line
    line=$("${python[@]}" -m distgpt.launch slurm progress "$run_dir" "$steps" 2>/dev/null) || return 0
    line=${line##*$'\n'}
    [[ -z $line ]] || scontrol update "JobId=$job" "Comment=$line" 2>/dev/null || true
}

# One task for each node, which may use every CPU: a cluster that binds tasks to CPUs would give it one.
task_a_node=(srun --quiet --export=ALL --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1)
if [[ $(scontrol show config) =~ TaskPlugin[\ =]+[a-z/,]*(affinity|cgroup) ]]; then task_a_node+=(--cpu-bind=none); fi

# require_shared_directory: end the job if a node cannot write its log, because it does not see what this one does.
require_shared_directory() {
    local blind
    # shellcheck disable=SC2016 # for the other shell
    # For a while: a network file system may show a new directory late.
    blind=$("${task_a_node[@]}" bash -c 'for _ in {1..10}; do
            if { : >>"$1/$SLURMD_NODENAME.log"; } 2>/dev/null; then exit; fi
            sleep 1
        done
        echo "$SLURMD_NODENAME"' bash "$mine") || true
    [[ -z $blind ]] ||
        fail 73 "${blind//$'\n'/, } cannot write in $mine: --run.dir must lie on a file system that all nodes share"
}

# on_all_nodes MODULE [OPTION ...]: run it under torchrun. Whatever ends it early ends this attempt, or the job.
on_all_nodes() {
    local status=0 code="" cause="" ended
    # A port that depends on the job and the attempt, and that is free on this node, the first one.
    if [[ -z $rendezvous_file ]]; then
        while port=$((port + 1)) && (: <"/dev/tcp/$address/$port") 2>/dev/null; do :; done
    fi
    export RENDEZVOUS_ENDPOINT=${rendezvous_file:-$address:$port} RENDEZVOUS_ID=$SLURM_JOB_ID.$attempt.$1
    # Of all ranks, the first to know why this ends says so here.
    DISTGPT_EXIT_FILE=$(realpath "$mine")/exit.json
    export DISTGPT_EXIT_FILE
    rm -f "$DISTGPT_EXIT_FILE"
    # --kill-on-bad-exit and --wait: what ends on one node ends on all. A step does not get the GPUs of an exclusive job by
    # itself: --gpus-per-node.
    supervise "${task_a_node[@]}" ${SLURM_GPUS_ON_NODE:+"--gpus-per-node=$SLURM_GPUS_ON_NODE"} \
        --kill-on-bad-exit=1 --wait=60 bash "$home/slurm/node.sh" "$mine" "$@" || status=$?
    ended=$("${python[@]}" -m distgpt.launch slurm ending "$mine" "$run_dir" "$steps" "$1" "$status") || ended=
    read -r code cause <<<"${ended##*$'\n'}"
    case $code in
        0) ;;
        75 | "") requeue "${cause:-no rank could say how it ended, see $mine}" ;;
        *) fail "$code" "$cause" ;;
    esac
}

port=$((10000 + (SLURM_JOB_ID * 101 + attempt * 7) % 20000))
say "attempt $attempt from $newest on $SLURM_JOB_NODELIST: tail -F $(printf %q "$mine")/*.log"
commenting=''
trap 'rm -f "$rendezvous_file"; kill $commenting 2>/dev/null || true; comment || true' EXIT
if ((SLURM_NNODES > 1)); then
    require_shared_directory
    [[ ${DISTGPT_PREFLIGHT:-yes} == no ]] || on_all_nodes distgpt.doctor --distributed "$@"
fi
# Often at first, then every five minutes, since each time a Python starts.
for ((pause = 2; ; pause = pause < 300 ? 2 * pause : 300)); do sleep "$pause" && comment; done &
commenting=$!
on_all_nodes distgpt.train "$@"
say "done: $run_dir is at $(basename "$(printf '%s\n' "$run_dir"/checkpoints/step-* | tail -n 1)")"
