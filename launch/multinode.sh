#!/usr/bin/env bash
# Train on several hosts without a scheduler: the same command on each of them, in any order.
#   HEAD=host:port NODES=4 launch/multinode.sh [PRESET] [--section.key=value ...]
#
#   HEAD             one of the hosts, by a name or an IPv4 address that all of them know, and a free port on it (the
#                    next port is used by the preflight)
#   NODES            how many hosts; MIN:MAX goes on with the hosts that are there, and takes in those that come later
#   NPROC_PER_NODE   ranks on each host; the default is one a GPU, or two that share the CPU's cores
#   JOIN_SECONDS     how long to wait for the other hosts (600)
#                    (hosts that are given another run.dir are another job, and wait for hosts of their own)
#   TRIES            attempts in a row without a new checkpoint before giving up (10)
#
# First come the checks of python -m distgpt.doctor --distributed, then training. When hosts, ranks or the network fail,
# every attempt ends on all hosts within health.timeout, and each starts again from the newest checkpoint. A mistake
# ends it at once on all hosts. A signal to this script stops the run at a saved step; this host then leaves (75), and
# the others wait for it to come back: to stop the run for good, stop it on each host.
# Exits with the code of the run, which torchrun would flatten to 1.
. "$(dirname "$0")/environment.sh"
environment ""
. "$home/launch/supervise.sh"
resolve_config "$@"
require_counts NPROC_PER_NODE JOIN_SECONDS TRIES

JOIN_SECONDS=${JOIN_SECONDS:-600}
TRIES=${TRIES:-10}
usage() { say "error: $*"; exit 2; }

if ! [[ ${HEAD:-} =~ ^([^:]+):([1-9][0-9]{0,4})$ ]] || ((BASH_REMATCH[2] > 65534)); then
    usage "HEAD=${HEAD:-} must be host:port: one of the hosts, and a free port on it from 1 to 65534"
fi
head=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
[[ ${NODES:-} =~ ^([1-9][0-9]{0,4})(:([1-9][0-9]{0,4}))?$ ]] || usage "NODES=${NODES:-} must say how many hosts there are: NODES=4 or NODES=3:4"
least=${BASH_REMATCH[1]} most=${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}
# A cut network must not leave two groups that both go on.
((least <= most && 2 * least > most)) ||
    usage "NODES=$NODES: the smaller number must be more than half of the larger one, so that only one side goes on when the network is cut"

ranks=${NPROC_PER_NODE:-$(default_ranks)}
# As with all mistakes: one clear line here, not in the agents' reports.
python - "$least" "$most" "$ranks" "$@" <<'PYTHON'
import math, os, sys
from distgpt.config import resolve
from distgpt.cli import main_guard
from distgpt.errors import UsageError
least, most, ranks = map(int, sys.argv[1:4])
def check() -> None:
    config = resolve(sys.argv[4:], os.environ)
    if config.parallel.strategy == "diloco" and least < most:
        raise UsageError(f"NODES={os.environ['NODES']}: diloco keeps the number of its replicas, write NODES={most}")
    batch, micro_batch = config.train.global_batch, max(1, config.train.micro_batch)
    for nodes in range(least, most + 1):
        if batch % (nodes * ranks * micro_batch):
            step = math.lcm(*range(least, most + 1)) * ranks * micro_batch
            raise UsageError(
                f"train.global_batch {batch} does not divide over {nodes} hosts x {ranks} ranks x train.micro_batch "
                f"{micro_batch}: take a multiple of {step}, which divides for NODES={os.environ['NODES']}"
            )
main_guard(check)
PYTHON

# Told explicitly, since guessing from the hostname goes wrong where names are shared, missing or mean 127.0.1.1.
route=$(python -m distgpt.preflight.network route "$head")
read -r is_host address interface <<<"$route"
# Two jobs at one rendezvous would wait for each other's hosts without a word.
for taken in "$port" "$((port + 1))"; do
    if ((is_host)) && (: <"/dev/tcp/$address/$taken") 2>/dev/null; then
        usage "port $taken of $head is taken, by another job or one that still ends: choose another in HEAD (its port and the next one are used)"
    fi
done
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
# NCCL chooses by itself among InfiniBand ports; this is for its first contact, and for plain Ethernet.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
# Each rank sets its own share of the threads; this only keeps torchrun from warning about it.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# When a host joins, the agents restart their ranks; with the store of before, gloo would find stale addresses in it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# The seconds that ranks have to save once they are told to stop; torchrun kills them after 30 by default.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# on_all_hosts PORT LAST_CALL MODULE ARGUMENTS...
# Hosts find each other by their run directory: one of another job waits for its own, and leaves the others alone.
# Every attempt has a store of its own, which ends with the head's torchrun, and no restart inside of it
# (--max-restarts=0): after a network failure such a restart would wait for agents that cannot hear each other, and a
# new attempt takes no longer. torchrun passes on only the signals it is told of, SIGUSR1 would kill it.
on_all_hosts() {
    local rendezvous=$1 last_call=$2 id
    shift 2
    id=$(cksum <<<"$run_dir")
    DISTGPT_EXIT_FILE=$report run torchrun --nnodes="$NODES" --nproc_per_node="$ranks" \
        --rdzv-backend=c10d --rdzv-endpoint="$head:$rendezvous" --rdzv-id="${id%% *}" --local-addr="$address" \
        --rdzv-conf="is_host=$is_host,join_timeout=$((2 * JOIN_SECONDS + 600)),last_call_timeout=$last_call" \
        --max-restarts=0 --monitor-interval=0.1 \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
        -m "$@"
}

# nobody_comes SECONDS: whether the hosts did not meet within JOIN_SECONDS, and then say so. torchrun's own limit, which is
# longer, ends in a traceback that does not tell how many are missing.
nobody_comes() {
    local came=()
    ((least > 1 && $1 >= JOIN_SECONDS)) || return 1
    if ((is_host)); then read -ra came < <(python -m distgpt.preflight.network guests "$rendezvous"); fi
    if ((is_host && ${#came[@]} + 1 < least)); then
        say "$((${#came[@]} + 1)) of $least hosts came within $JOIN_SECONDS s (this one${came[*]:+, ${came[*]}}): start the same command on the missing ones"
    elif (($1 >= JOIN_SECONDS + 15)); then # they may just have met, and wait for more
        say "$least hosts did not meet at $head within $JOIN_SECONDS s: have all of them the same run.dir and NODES?"
    else
        return 1
    fi
    : >"$scratch/alone"
}

# How the attempt ended: this host's report, or the run's own if it is new and says that it is done, or why it ended.
ending() {
    python - "$report" "$run_dir/exit.json" "$scratch/started" <<'PYTHON'
import json, os, sys
mine, run, started = sys.argv[1:]
def read(path):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None
found = read(mine)
if found is None or found["code"] == 75:
    shared = read(run)
    # Other hosts than the one with the trouble, or than the first to leave when all is done, only see that it is gone.
    if shared and shared["code"] != 75 and shared != read(started):
        found = shared
if found is not None:
    print(found["code"], found["cause"])
PYTHON
}

attempts=0 tries=0 checked='' before=$(newest_checkpoint)
# What comes from here on is this job's own.
[[ $before ]] || set -- "$@" --run.fresh=false
while true; do
    [[ ! $signalled ]] || { status=75; break; }
    report=$scratch/exit-$((++attempts)).json
    cp "$run_dir/exit.json" "$scratch/started" 2>/dev/null || rm -f "$scratch/started"
    status=0 phase=train
    if ((is_host)); then
        [[ $checked ]] || phase=preflight
    else
        # The head's state decides: a host that comes late, or back, finds training under way and joins it, and a head
        # that was restarted finds the others ready to go through the preflight with it.
        ports=("$port")
        [[ $checked ]] || ports+=("$((port + 1))")
        run python -m distgpt.preflight.network wait "$head" "$JOIN_SECONDS" "${ports[@]}" >"$scratch/open" || status=75
        ((status == 0)) || break
        (($(<"$scratch/open") == port)) || phase=preflight
    fi
    if [[ $phase == preflight ]]; then
        on_all_hosts "$((port + 1))" 10 distgpt.doctor --distributed "$@" || status=$?
        ((status == 0)) && checked=yes && continue
    else
        checked=yes
        on_all_hosts "$port" 3 distgpt.train "$@" || status=$?
        ((status == 0)) && break
    fi
    [[ ! -e $scratch/alone ]] || { status=75; break; }
    told=$(ending)
    code=${told%% *} cause=${told#* }
    [[ $signalled ]] && say "stopped by SIG$signalled on this host${cause:+: $cause}" && status=75 && break
    case $code in
        75 | '') ;;
        73) ((attempts > 2)) || { status=73; say_end 73 "$cause"; break; } ;; # later, ranks of ours that are cut off hold it
        *) status=$code; say_end "$code" "$cause"; break ;;
    esac
    cause=${cause:-no rank could say why, see above}
    cause=${cause%[,:] run it again to go on}
    [[ $(newest_checkpoint) == "$before" ]] || tries=0
    before=$(newest_checkpoint)
    if ((++tries >= TRIES)); then
        say "gave up after $TRIES attempts without a new checkpoint: $cause; run it again to go on"
        status=75
        break
    fi
    ((is_host)) || checked=''
    say "$cause; starting again (attempt $((attempts + 1)))"
    sleep $((tries < 5 ? tries : 5)) || true # Ctrl-C ends it as well
done
exit "$status"
