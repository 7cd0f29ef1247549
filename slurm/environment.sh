# Sourced by the scripts beside it, inside of a job and with $home set: the environment, and how a job goes on. With
# $stop_signal set, requests to stop are passed on to the command under supervision from here on, as this signal.
# shellcheck shell=bash disable=SC2034
#
# DISTGPT_ENV=FILE is the one hook: a bash file that every node sources before it runs anything of ours. It loads modules,
# activates a virtual environment, exports variables, and for a container sets what stands before each command:
#   module load cuda/12.8
#   . ~/venvs/gpt/bin/activate
#   DISTGPT_RUN="apptainer exec --nv --bind $PWD /images/pytorch.sif"
# Without it the project's .venv is taken where there is one, else the python of your PATH.

say() {
    echo "distgpt: $*" >&2
}

# fail CODE CAUSE: end the job, and do not start it again. What fails on a node is told to train.sh as by a rank.
fail() {
    local cause=${2//\\/\\\\}
    say "error: $2"
    if [[ $0 == */node.sh && ! -e ${DISTGPT_EXIT_FILE:?} ]]; then
        printf '{"code": %d, "cause": "%s"}\n' "$1" "${cause//\"/\\\"}" 2>/dev/null >"$DISTGPT_EXIT_FILE" || true
    fi
    exit "$1"
}

# One task of an array has a name of its own; to requeue the bare number may mean the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
attempt=${SLURM_RESTART_COUNT:-0}

pass_on() {
    stopped=${stopped:-$SECONDS}
    if [[ -n $child ]]; then kill "-$stop_signal" "$child" 2>/dev/null || true; fi
}

# end_with_job: Slurm ends the job by itself.
end_with_job() {
    ended_by_slurm=yes stopped=${stopped:-$SECONDS}
    # The save took longer than --signal left for it, and Slurm would not start such a job again.
    if [[ $(scontrol show job "$job") == *Reason=TimeLimit* ]] && scontrol requeue "$job"; then
        say "the time limit came before the end of the save; requeued to go on from the last checkpoint"
    fi
    # The tasks of srun get this signal from Slurm. Told again, torchrun breaks off what it does about it, and when told a
    # third time it leaves, and takes its ranks with it before they have saved.
    if [[ $stop_signal == TERM ]]; then pass_on; fi
}

# supervise COMMAND ...: run it to its end; gives its exit status.
supervise() {
    local status=0
    [[ -z ${stopped:-} ]] || requeue "stopped before the start"
    "$@" &
    child=$!
    # Told to stop when there was nothing yet to pass it on to.
    if [[ ${stopped:-} && ! ${ended_by_slurm:-} ]]; then pass_on; fi
    # A trapped signal ends one wait.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" || status=$?
    child=
    return "$status"
}

# requeue CAUSE: end this attempt, and have Slurm start another.
requeue() {
    if [[ -n ${ended_by_slurm:-} ]]; then
        # It does so after `scontrol requeue`, a lost node and a preemption, and not after `scancel`.
        say "$1; ended by Slurm, which decides whether to start it again"
    elif scontrol requeue "$job"; then
        say "$1; requeued to go on"
        [[ -z ${stopped:-} ]] || advise_on_time_limit
    elif [[ $(scontrol show job "$job") == *Requeue=0* ]]; then
        say "$1; this job cannot be requeued: submit it again to go on"
    else
        # As after a lost node: Slurm was faster, and a second job would be in the way of this one.
        say "$1; Slurm refuses to requeue it now: submit it again only if squeue shows that it is gone"
    fi
    exit 75
}

# require_python: end the job if there is none with distgpt's packages.
require_python() {
    local said fix="make ${home:?}/.venv or set DISTGPT_ENV"
    said=$("${python[@]}" -c 'import importlib.util, sys, distgpt.config
print("found" if importlib.util.find_spec("torch") else "no torch in " + sys.executable)' 2>&1) || true
    said=${said##*$'\n'}
    if [[ -n ${DISTGPT_ENV:-} ]]; then fix="DISTGPT_ENV=$DISTGPT_ENV must activate one, or set DISTGPT_RUN"; fi
    [[ $said == found ]] || fail 2 "no python with distgpt's packages (${said:-it says nothing}): $fix"
}

# advise_on_time_limit: say so if what --signal asks for comes so early that no attempt gets anything done.
advise_on_time_limit() {
    local limit
    limit=$(scontrol show job "$job" | sed -n 's/.*TimeLimit=00:0\([0-9]\):00 .*/\1/p') || return 0
    if [[ -n $limit ]] && ((stopped < 30)); then
        say "stopped $stopped s after the start: if it was for the time limit of $limit min, that leaves no time to work in; raise --time or give a shorter --signal=B:USR1@SECONDS"
    fi
}

if [[ -n ${stop_signal:-} ]]; then
    # From --signal: the time limit is near.
    trap 'say "SIGUSR1: asking for a save and an end"; pass_on' USR1
    trap end_with_job TERM
fi

if [[ -n ${DISTGPT_ENV:-} ]]; then
    [[ -r $DISTGPT_ENV ]] || fail 2 "DISTGPT_ENV names $DISTGPT_ENV, which cannot be read"
    # Modules and conda are not written for `set -eu`.
    set +eu
    trap 'fail 2 "DISTGPT_ENV=$DISTGPT_ENV ended the job by exit or set -e: it must come to its end"' EXIT
    # shellcheck source=/dev/null
    . "$DISTGPT_ENV"
    trap - EXIT
    set -eu
elif [[ -x $home/.venv/bin/python ]]; then
    PATH=$home/.venv/bin:$PATH
fi
read -ra python <<<"${DISTGPT_RUN:-} python"
# The code beside these scripts runs, whatever directory the job is in.
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
# A log shows each line as it is written, and a rank that is killed takes none with it.
export PYTHONUNBUFFERED=1
