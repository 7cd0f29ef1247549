#!/usr/bin/env bash
# From nothing to a trained GPT, its loss curve and a text it wrote: Python's own standard library as the corpus.
#   launch/quickstart.sh [--section.key=value ...]
. "$(dirname "$0")/environment.sh"
environment ""
case " $* " in *" --help "* | *" -h "*) exec python -m distgpt.train --help ;; esac
run=$(python -m distgpt.train quickstart "$@" --print-config | sed -n 's/^dir = "\(.*\)"$/\1/p')

python -m distgpt.prepare
launch/local.sh quickstart "$@"
echo
echo "--- what it writes ---"
python -m distgpt.sample "$run" --prompt "def " --tokens 400
echo
echo "loss curve: $run/plots/loss.png"
echo "TensorBoard: .venv/bin/tensorboard --logdir $run/tb"
echo "more text: .venv/bin/python -m distgpt.sample $run --prompt 'class '"
