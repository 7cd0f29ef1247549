#!/usr/bin/env bash
# Tokenize a large corpus as a job array. Each task encodes its share, and the last one to end writes the output, which is
# byte for byte that of a single process. All options go to distgpt.prepare:
#   sbatch [--array=0-31 ...] slurm/prepare.sh --input /data/texts --output data/mine --tokenizer gpt2
# An interrupted task is requeued and goes on. After a failure, submit the job again: it goes on too.
#SBATCH --job-name=distgpt-prepare
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Environment: DISTGPT_ENV and DISTGPT_HOME, as in slurm/train.sh.
set -euo pipefail
: "${SLURM_JOB_ID:?submit this with sbatch}"
# Note a signal to stop that comes before environment.sh handles it.
stop_signal=TERM stopped='' child=''
trap 'stopped=$SECONDS' USR1

# sbatch runs a copy of this file. Find the project by the command as it was submitted: the path may contain spaces, and
# options follow it.
home=${DISTGPT_HOME:-}
read -ra submitted < <(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p') || submitted=()
for ((words = 1; words <= ${#submitted[@]}; words++)); do
    file=$(cd "$SLURM_SUBMIT_DIR" && readlink -e -- "${submitted[*]:0:words}") || continue
    if [[ -z $home && $file == */slurm/prepare.sh ]]; then home=${file%/slurm/prepare.sh}; fi
done
[[ -r ${home:=$SLURM_SUBMIT_DIR}/slurm/environment.sh ]] || {
    echo "distgpt: error: $home is not the project: submit from its directory, or set DISTGPT_HOME to it" >&2
    exit 2
}
. "$home/slurm/environment.sh"
require_python

tasks=$((${SLURM_ARRAY_TASK_MAX:-0} + 1))
if ((${SLURM_ARRAY_TASK_MIN:-0} != 0 || ${SLURM_ARRAY_TASK_COUNT:-1} != tasks)); then
    fail 2 "the array must be --array=0-N, with every task: tasks that are already done take no time"
fi
status=0
supervise "${python[@]}" -m distgpt.prepare --workers "${SLURM_CPUS_PER_TASK:-1}" \
    --task "${SLURM_ARRAY_TASK_ID:-0}/$tasks" "$@" || status=$?
# Stopped or killed: requeue. The next attempt keeps the finished parts. But a machine may never finish a part, so attempts
# are limited.
if ((status == 75 || status > 128)); then
    ((attempt < 20)) || fail 75 "gave up after $attempt restarts: submit it again to go on"
    requeue "exit code $status"
fi
exit "$status"
