# Sourced by the scripts beside it: a command in the background that is told once of what should stop it.
# shellcheck shell=bash
say() { echo "distgpt: $*" >&2 || true; } # a terminal may be gone

child='' signalled=''
for signal in TERM INT HUP USR1; do
    # Only the first: told twice, torchrun breaks off what it does about it, and the save with it.
    # shellcheck disable=SC2064
    trap "[[ \$signalled ]] || kill -TERM \$child 2>/dev/null || true; signalled=$signal" "$signal"
done
# Ctrl-\ ends it at once, whatever it does.
trap 'signalled=QUIT; kill -QUIT $child 2>/dev/null || true' QUIT

# Where the script itself is killed, what it started saves and ends.
if setpriv --pdeathsig TERM true 2>/dev/null; then orphaned=(setpriv --pdeathsig TERM); else orphaned=(env); fi

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
    # A trapped signal ends one wait; it is over when it is gone.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    wait "$child" || status=$?
    child=''
    return "$status"
}
