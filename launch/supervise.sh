# Sourced by the scripts beside it: a command in the background that is told once of what should stop it, and ended where
# it cannot end by itself.
# shellcheck shell=bash
say() { echo "distgpt: $*" >&2 || true; } # a terminal may be gone
# say_end CODE CAUSE: why a run ended, as its ranks would say it.
say_end() { case $1 in 0 | 75) say "$2" ;; *) say "error: $2" ;; esac }

child='' signalled='' told_at=0
# told SIGNAL: pass on the first alone: told twice, torchrun breaks off what it does about it, and the save with it. A
# Ctrl-C that is clearly typed again asks for that.
told() {
    if [[ ! $signalled ]]; then
        signalled=$1 told_at=$SECONDS
        kill -TERM "$child" 2>/dev/null || true
    elif [[ $1 == INT ]] && ((SECONDS - told_at >= 2)); then
        kill -QUIT "$child" 2>/dev/null || true
    fi
}
for signal in TERM INT HUP USR1; do
    # shellcheck disable=SC2064
    trap "told $signal" "$signal"
done
# Ctrl-\ ends it at once, whatever it does.
trap 'signalled=QUIT; kill -QUIT $child 2>/dev/null || true' QUIT

# Where the script itself is killed, what it started saves and ends.
if setpriv --pdeathsig TERM true 2>/dev/null; then orphaned=(setpriv --pdeathsig TERM); else orphaned=(env); fi

# run COMMAND ...: to its end; gives its exit code. Needs `timeout`, see resolve_config.
run() {
    local status=0 watch
    start "$@"
    terminate_unresponsive_agent "$child" >/dev/null &
    watch=$!
    finish || status=$?
    kill "$watch" 2>/dev/null || true
    return "$status"
}

# start COMMAND ...: in a process group of its own (-m), since a terminal sends Ctrl-C to all of the script's. Sets `child`.
start() {
    set -m
    "${orphaned[@]}" "$@" &
    child=$!
    set +m
    # Told to stop when there was nothing yet to pass it on to.
    if [[ $signalled ]]; then kill -TERM "$child" || true; fi
}

# finish: wait for the end of what was started; gives its exit code.
finish() {
    local status=0
    # A trapped signal ends one wait; it is over when it is gone. Of one that was killed bash would show this line.
    while kill -0 "$child" 2>/dev/null; do wait "$child" 2>/dev/null || true; done
    wait "$child" 2>/dev/null || status=$?
    child=''
    return "$status"
}

# terminate_unresponsive_agent AGENT: a torchrun that the network cut off from the head waits for its answer for ever, and
# notices neither signals nor the end of its ranks. It is killed once it has had ranks and has had none for a while. It is
# also killed when all its ranks are stopped for health.timeout: they would not end when it tells them to. One that never
# has any is ended when `nobody_comes SECONDS`, where a script defines it, says why after so many.
terminate_unresponsive_agent() {
    local agent=$1 had_ranks='' seconds=0 limit began=$SECONDS
    while kill -0 "$agent" 2>/dev/null; do
        if has_ranks "$agent" ZT; then
            had_ranks=yes seconds=0
        elif [[ $had_ranks ]]; then
            if has_ranks "$agent" Z; then limit=${timeout:?}; else limit=$((timeout < 60 ? timeout : 60)); fi
            if ((++seconds > limit)); then
                say "all ranks are gone or stopped since $limit s: killing torchrun, which does not end by itself"
                kill -KILL "$agent" 2>/dev/null || true
            fi
        elif declare -F nobody_comes >/dev/null && nobody_comes $((SECONDS - began)); then
            kill -KILL "$agent" 2>/dev/null || true
            return
        fi
        sleep 1
    done
}

# has_ranks AGENT STATES: whether it has any that is in none of these states of /proc: Z, dead and not yet noticed by
# the agent, T, stopped.
has_ranks() {
    local pid
    for pid in $(cat "/proc/$1/task/$1/children" 2>/dev/null || true); do
        grep -q "^State:[[:space:]]*[$2]" "/proc/$pid/status" 2>/dev/null || return 0
    done
    return 1
}

newest_checkpoint() {
    { find "${run_dir:?}/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null || true; } | sort | tail -n 1
}
