#!/usr/bin/env bash
# Train on all devices of this machine: every GPU, or two ranks that share the CPU's cores.
#   launch/local.sh [PRESET] [--section.key=value ...]
# A rank that dies or hangs costs the steps since the last checkpoint: all start again, until TRIES (3) launches in a row
# got no further. Exits with the code of the run (0 done, 2 usage, 75 interrupted: run it again, ...), which torchrun would
# flatten to 1.
. "$(dirname "$0")/environment.sh"
environment ""
. "$home/launch/supervise.sh"
resolve_config "$@"
require_counts NPROC_PER_NODE TRIES

ranks=${NPROC_PER_NODE:-$(default_ranks)}
DISTGPT_EXIT_FILE=$(mktemp -d)/exit.json
export DISTGPT_EXIT_FILE
trap 'rm -rf "$(dirname "$DISTGPT_EXIT_FILE")"' EXIT
# Each rank sets its own share of the threads; this only keeps torchrun from warning about it.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The seconds that ranks have to save once they are told to stop; torchrun kills them after 30 by default.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# launch OPTION ...: train until the end of torchrun. Leaves the exit code in `status` and, unless that is 0, `cause`.
launch() {
    local rendezvous
    rendezvous=$(mktemp -p "$(dirname "$DISTGPT_EXIT_FILE")")
    rm -f "$DISTGPT_EXIT_FILE"
    status=0 cause=
    # torchrun passes on only the signals it is told of, and SIGUSR1 would kill it.
    # A file, where --standalone would listen on all interfaces: whoever reaches that can have torchrun run his code.
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 run torchrun --nproc_per_node="$ranks" --max-restarts=3 \
        --rdzv-backend=c10d --rdzv-endpoint="$rendezvous" --rdzv-id="${rendezvous##*/}" \
        --rdzv-conf=store_type=file,keep_alive_interval=3600 --local-addr=127.0.0.1 \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
        -m distgpt.train "$@" || status=$?
    if ((status == 0)); then return; fi
    status=75 cause="killed before any rank could say why: run it again to go on"
    if [[ -s $DISTGPT_EXIT_FILE ]]; then
        read -r status cause < <(python -c 'import json, sys
report = json.load(open(sys.argv[1]))
print(report["code"], report["cause"])' "$DISTGPT_EXIT_FILE")
    fi
}

# What comes from here on is this job's own.
[[ $(newest_checkpoint) ]] || set -- "$@" --run.fresh=false
for ((try = 1; try <= ${TRIES:-3}; try++)); do
    before=$(newest_checkpoint)
    launch "$@"
    # The last line says what happened, below torchrun's own report.
    if [[ $signalled || $status != 75 ]]; then
        if [[ -n $cause ]]; then say_end "$status" "$cause"; fi
        exit "$status"
    fi
    newest=$(newest_checkpoint)
    if [[ $newest != "$before" ]]; then try=0; fi
    say "${cause%[,:] run it again to go on}"
    if ((try < ${TRIES:-3})); then say "starting again from $(basename "${newest:-the beginning}")"; fi
done
say "gave up after $((try - 1)) launches that got no further: run it again to go on"
exit "$status"
