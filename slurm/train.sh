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
for name in NPROC_PER_NODE TRIES; do
    [[ ${!name:-1} =~ ^[1-9][0-9]{0,8}$ ]] || fail 2 "$name=${!name}: it must be a whole number from 1"
done

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    [[ -r ${DISTGPT_SWEEP:-} ]] ||
        fail 2 "DISTGPT_SWEEP=${DISTGPT_SWEEP:-} cannot be read: it must name a file with a line of flags for each task"
    # Quotes as in a shell, ends of lines as any editor writes them.
    mapfile -d '' -t flags < <("${python[@]}" -m distgpt.launch slurm flags "$DISTGPT_SWEEP" "$SLURM_ARRAY_TASK_ID")
    wait "$!"
    flags[0]=${flags[0]##*$'\n'} # a container may greet first
    set -- "$@" "${flags[@]}"
fi
# What a later attempt finds in the run directory is the job's own.
((attempt == 0)) || set -- "$@" --run.fresh=false
node=$(scontrol show node "$SLURMD_NODENAME") || node=
memory=$((${SLURM_MEM_PER_NODE:-0} + ${SLURM_MEM_PER_CPU:-0} * ${SLURM_CPUS_ON_NODE:-1}))
if [[ $node =~ RealMemory=([0-9]+) ]] && ((0 < memory && 2 * memory < BASH_REMATCH[1])); then
    say "the job may use $memory of the ${BASH_REMATCH[1]} MiB of memory of $SLURMD_NODENAME: --mem=0 asks for all of it"
fi
if [[ -z ${SLURM_GPUS_ON_NODE:-}${NPROC_PER_NODE:-} && $node =~ Gres=[^[:space:]]*gpu ]]; then
    fail 2 "$SLURMD_NODENAME has GPUs and the job asked for none: add --gpus-per-node=N, or NPROC_PER_NODE=2 for its CPUs"
fi
# A mistake is one line here, before any rank starts.
plan=$("${python[@]}" -m distgpt.launch slurm plan "$@")
read -r steps run_dir <<<"${plan##*$'\n'}"
if [[ -n ${SLURM_ARRAY_TASK_ID:-} && " ${flags[*]}" != *" --run.dir"[=\ ]* ]]; then
    run_dir=$run_dir-$SLURM_ARRAY_TASK_ID
    set -- "$@" "--run.dir=$run_dir"
fi
logs=$run_dir/logs/slurm-$SLURM_JOB_ID
mine=$logs/attempt-$attempt
mkdir -p "$mine" || fail 73 "cannot write to the run directory $run_dir; choose another with --run.dir=DIR"

newest_checkpoint() {
    local newest
    newest=$({ find "$run_dir/checkpoints" -maxdepth 1 -name 'step-*' -printf '%f\n' 2>/dev/null || true; } | sort | tail -n 1)
    echo "${newest:-no checkpoint}"
}

# comment: show the newest training line, where there is one, as the job's comment.
comment() {
    local line
    line=$({ tail -n 5 "$run_dir/metrics.jsonl" 2>/dev/null || true; } |
        sed -n 's/.*"step": \([0-9]*\), "loss": \([0-9.]*\).*"seconds": \([0-9.e-]*\).*/\1 \2 \3/p' | tail -n 1)
    [[ -n $line ]] || return 0
    line=$(awk -v steps="$steps" '{
        left = int((steps - $1) * $3)
        printf "step %d/%d loss %.4f ETA %d-%02d:%02d:%02d", $1, steps, $2, left / 86400, left / 3600 % 24, left / 60 % 60, left % 60
    }' <<<"$line")
    scontrol update "JobId=$job" "Comment=$line" 2>/dev/null || true
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

# can_write: whether there is room for a rank to say how it ended.
can_write() {
    head -c 4096 /dev/zero 2>/dev/null >"$mine/probe" && rm "$mine/probe"
}

# on_all_nodes MODULE [OPTION ...]: run it under torchrun. Whatever ends it early ends this attempt, or the job. Training has
# succeeded where a rank says so after the last step, and not where nothing failed: what never started does not either.
on_all_nodes() {
    local status=0 code="" step="" cause="no rank could say how it ended, see $mine" ended
    # A port that depends on the job and the attempt, and that is free on this node, the first one.
    while port=$((port + 1)) && (: <"/dev/tcp/$address/$port") 2>/dev/null; do :; done
    export RENDEZVOUS_ENDPOINT=${rendezvous_file:-$address:$port} RENDEZVOUS_ID=$SLURM_JOB_ID.$attempt.$1
    # Of all ranks, the first to know why this ends says so here.
    DISTGPT_EXIT_FILE=$(realpath "$mine")/exit.json
    export DISTGPT_EXIT_FILE
    rm -f "$DISTGPT_EXIT_FILE"
    # --kill-on-bad-exit and --wait: what ends on one node ends on all. A step does not get the GPUs of an exclusive job by
    # itself: --gpus-per-node.
    supervise "${task_a_node[@]}" ${SLURM_GPUS_ON_NODE:+"--gpus-per-node=$SLURM_GPUS_ON_NODE"} \
        --kill-on-bad-exit=1 --wait=60 bash "$home/slurm/node.sh" "$mine" "$@" || status=$?
    if [[ -s $DISTGPT_EXIT_FILE ]]; then
        ended=$("${python[@]}" -m distgpt.launch slurm ending "$DISTGPT_EXIT_FILE")
        read -r code step cause <<<"${ended##*$'\n'}"
        if [[ $code == 0 && $step -lt $steps ]]; then code="" cause="ended at step $step of $steps"; fi
    elif [[ $status == 0 && $1 != distgpt.train ]]; then
        code=0
    elif ! can_write; then
        code=74 cause="cannot write in $run_dir: make room and submit it again to go on"
    fi
    case $code in
        0) ;;
        75 | "") requeue "${cause%[,:] run it again to go on}" ;;
        73)
            # What is left of the last attempt may still hold the run directory on a node that was lost.
            ((attempt == 0)) || requeue "$cause"
            fail 73 "$cause"
            ;;
        *) fail "$code" "$cause" ;;
    esac
}

require_progress "$logs/progress" "$(newest_checkpoint)"
address=$(own_address)
port=$((10000 + (SLURM_JOB_ID * 101 + attempt * 7) % 20000))
say "attempt $attempt from $(newest_checkpoint) on $SLURM_JOB_NODELIST: tail -F $(printf %q "$mine")/*.log"
commenting='' rendezvous_file=''
trap 'rm -f "$rendezvous_file"; kill $commenting 2>/dev/null || true; comment || true' EXIT
if ((SLURM_NNODES == 1)); then
    # Where torchrun sees it, which may run in a container.
    rendezvous_file=$("${python[@]}" -c 'import tempfile; print(tempfile.mkstemp()[1])') ||
        fail 74 "cannot create a temporary file on $SLURMD_NODENAME: free some space or set TMPDIR, then submit the job again"
    rendezvous_file=${rendezvous_file##*$'\n'}
else
    require_shared_directory
fi
if ((SLURM_NNODES > 1)) && [[ ${DISTGPT_PREFLIGHT:-yes} != no ]]; then
    on_all_nodes distgpt.doctor --distributed "$@"
fi
# Often at first, then once a minute.
for ((pause = 2; ; pause = pause < 60 ? 2 * pause : 60)); do sleep "$pause" && comment; done &
commenting=$!
on_all_nodes distgpt.train "$@"
say "done: $run_dir is at $(newest_checkpoint)"
