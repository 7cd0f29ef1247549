#!/usr/bin/env bash
# Train on all devices of this machine: every GPU, or two ranks that share the CPU's cores.
#   launch/local.sh [PRESET] [--section.key=value ...]
# Exits with the code of the run (0 done, 2 usage, 75 interrupted: run it again, ...), which torchrun would flatten to 1.
. "$(dirname "$0")/environment.sh"
environment ""

case " $* " in *" --help "* | *" -h "*) exec python -m distgpt.train --help ;; esac
# A mistyped key is one clear line here; under torchrun it would drown in the agent's report.
python -m distgpt.train "$@" --print-config >/dev/null

if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    gpus=${#visible[@]}
else
    gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
fi
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : cores > 1 ? 2 : 1))}
DISTGPT_EXIT_FILE=$(mktemp -d)/exit.json
export DISTGPT_EXIT_FILE
trap 'rm -rf "$(dirname "$DISTGPT_EXIT_FILE")"' EXIT
# Each rank sets its own share of the threads; this only keeps torchrun from warning about it.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The seconds that ranks have to save once they are told to stop; torchrun kills them after 30 by default.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# torchrun passes on only the signals it is told of, and SIGUSR1 would kill it.
torchrun --standalone --nproc_per_node="$ranks" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m distgpt.train "$@" &
agent=$!
stopped=
for signal in TERM INT HUP USR1; do
    # TERM for all: a shell starts what runs in the background deaf to INT.
    # shellcheck disable=SC2064
    trap "stopped=yes; kill -TERM $agent 2>/dev/null || true" "$signal"
done
status=0
# A trapped signal ends one wait; the run ends when torchrun is gone.
while kill -0 "$agent" 2>/dev/null; do
    status=0
    wait "$agent" || status=$?
done
if [[ $status -ne 0 && -s $DISTGPT_EXIT_FILE ]]; then
    # The last line says what happened, below torchrun's own report.
    status=$(python -c 'import json, sys
report = json.load(open(sys.argv[1]))
print("distgpt:", report["cause"], file=sys.stderr)
print(report["code"])' "$DISTGPT_EXIT_FILE")
fi
# Stopped before any rank could say so: there was nothing to save yet.
if [[ -n $stopped && $status -ne 0 && ! -s $DISTGPT_EXIT_FILE ]]; then status=75; fi
exit "$status"
