#!/usr/bin/env bash
# Train a small GPT on Python's own standard library, then show its loss curve and a text that it writes.
#   launch/quickstart.sh [--section.key=value ...]
# Writes data/stdlib and runs/quickstart in the working directory.
. "$(dirname "$0")/environment.sh"
environment ""
case " $* " in *" --help"[\ =]* | *" -h "* | *" --print-config "*) exec python -m distgpt.train quickstart "$@" ;; esac
run_dir=$(python -m distgpt.launch directory quickstart "$@")

python -m distgpt.prepare
"$home/launch/local.sh" quickstart "$@"
echo
echo "--- what it writes ---"
python -m distgpt.sample "$run_dir" --prompt "def " --tokens 400
echo
echo "loss curve: $run_dir/plots/loss.png"
printf 'TensorBoard: %q --logdir %q\n' "$home/.venv/bin/tensorboard" "$run_dir/tb"
printf "more text: %q -m distgpt.sample %q --prompt 'class '\n" "$home/.venv/bin/python" "$run_dir"
