# Sourced by the scripts beside it, in a job, with $home set: sets up the environment, and has the functions that end a
# job and requeue it. If $stop_signal is set, a request to stop is passed on to the supervised command as this signal.
# shellcheck shell=bash disable=SC2034
#
# DISTGPT_ENV=FILE is a bash file that every node sources before it runs distgpt. It can load modules, activate a virtual
# environment, export variables, and for a container set DISTGPT_RUN, which is put before each python command:
#   module load cuda/12.8
#   . ~/venvs/gpt/bin/activate
#   DISTGPT_RUN="apptainer exec --nv --bind $PWD /images/pytorch.sif"
# Without DISTGPT_ENV, the project's .venv is used if it exists, else the python of your PATH.

say() {
    echo "distgpt: $*" >&2
}

# fail CODE CAUSE: end the job, and do not requeue it. In node.sh, report the cause in exit.json, as a rank does.
fail() {
    local cause=${2//\\/\\\\}
    say "error: $2"
    if [[ $0 == */node.sh && ! -e ${DISTGPT_EXIT_FILE:?} ]]; then
        printf '{"code": %d, "cause": "%s"}\n' "$1" "${cause//\"/\\\"}" 2>/dev/null >"$DISTGPT_EXIT_FILE" || true
    fi
    exit "$1"
}

# The id of a task of an array includes its number. The bare id of the array could requeue all its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
attempt=${SLURM_RESTART_COUNT:-0}

# pass_on_stop: send the supervised command the signal to stop, and note the time of the first such request.
pass_on_stop() {
    stopped=${stopped:-$SECONDS}
    if [[ -n $child ]]; then kill "-$stop_signal" "$child" 2>/dev/null || true; fi
}

# handle_term: SIGTERM means that Slurm ends the job: at the time limit, a preemption, scancel or scontrol requeue.
handle_term() {
    ended_by_slurm=yes stopped=${stopped:-$SECONDS}
    # The save took longer than --signal allowed, and Slurm does not requeue such a job by itself.
    if [[ $(scontrol show job "$job") == *Reason=TimeLimit* ]] && scontrol requeue "$job"; then
        say "the time limit came before the end of the save; requeued to go on from the last checkpoint"
    fi
    # Only prepare.sh, whose stop signal is TERM, passes SIGTERM on. In train.sh, Slurm itself sends it to the tasks of srun,
    # and with more signals torchrun ends before its ranks have saved.
    if [[ $stop_signal == TERM ]]; then pass_on_stop; fi
}

# supervise COMMAND ...: run it to its end and return its exit status. Requeues the job if a stop was requested before.
supervise() {
    local status=0
    [[ -z ${stopped:-} ]] || requeue "stopped before the start"
    "$@" &
    child=$!
    # The signal to stop may have come just before there was a child.
    if [[ ${stopped:-} && ! ${ended_by_slurm:-} ]]; then pass_on_stop; fi
    # A loop, since a trapped signal ends a wait.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" || status=$?
    child=
    return "$status"
}

# requeue CAUSE: end this attempt, and let Slurm start another one.
requeue() {
    if [[ -n ${ended_by_slurm:-} ]]; then
        # Slurm starts it again after `scontrol requeue`, a lost node and a preemption, but not after `scancel`.
        say "$1; ended by Slurm, which decides whether to start it again"
    elif scontrol requeue "$job"; then
        say "$1; requeued to go on"
        [[ -z ${stopped:-} ]] || advise_on_time_limit
    elif [[ $(scontrol show job "$job") == *Requeue=0* ]]; then
        say "$1; this job cannot be requeued: submit it again to go on"
    else
        # For example after a lost node, when Slurm has requeued the job already. The user must not submit a second one.
        say "$1; Slurm refuses to requeue it now: submit it again only if squeue shows that it is gone"
    fi
    exit 75
}

# require_python: end the job unless python has distgpt's packages.
require_python() {
    local answer fix="make ${home:?}/.venv or set DISTGPT_ENV"
    answer=$("${python[@]}" -c 'import importlib.util, sys, distgpt.config
print("found" if importlib.util.find_spec("torch") else "no torch in " + sys.executable)' 2>&1) || true
    answer=${answer##*$'\n'}
    if [[ -n ${DISTGPT_ENV:-} ]]; then fix="DISTGPT_ENV=$DISTGPT_ENV must activate one, or set DISTGPT_RUN"; fi
    [[ $answer == found ]] || fail 2 "no python with distgpt's packages (${answer:-no output}): $fix"
}

# advise_on_time_limit: warn if the signal before the time limit came so early that no attempt can make progress.
advise_on_time_limit() {
    local limit
    limit=$(scontrol show job "$job" | sed -n 's/.*TimeLimit=00:0\([0-9]\):00 .*/\1/p') || return 0
    if [[ -n $limit ]] && ((stopped < 30)); then
        say "stopped $stopped s after the start: if that was for the time limit of $limit min, no time is left to train; raise --time or give a shorter --signal=B:USR1@SECONDS"
    fi
}

if [[ -n ${stop_signal:-} ]]; then
    # Slurm sends SIGUSR1 shortly before the time limit: see --signal.
    trap 'say "SIGUSR1: asking the ranks to save and stop"; pass_on_stop' USR1
    trap handle_term TERM
fi

if [[ -n ${DISTGPT_ENV:-} ]]; then
    [[ -r $DISTGPT_ENV ]] || fail 2 "DISTGPT_ENV names $DISTGPT_ENV, which cannot be read"
    # Modules and conda are not written for `set -eu`.
    set +eu
    trap 'fail 2 "DISTGPT_ENV=$DISTGPT_ENV ended the job by exit or set -e: it must run to its end"' EXIT
    # shellcheck source=/dev/null
    . "$DISTGPT_ENV"
    trap - EXIT
    set -eu
elif [[ -x $home/.venv/bin/python ]]; then
    PATH=$home/.venv/bin:$PATH
fi
read -ra python <<<"${DISTGPT_RUN:-} python"
# Import the code beside these scripts, whatever the working directory of the job is.
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
# Write each line to the log at once, so that none is lost when a rank is killed.
export PYTHONUNBUFFERED=1
