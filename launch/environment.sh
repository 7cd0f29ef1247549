# Sourced by the scripts beside it: enter the project, make sure of a .venv with distgpt and its pinned packages, and
# find out how many ranks this host should have.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# environment [EXTRA,...]: install once, and again only when the requirements change, so that a later start needs no network.
environment() {
    local extras=${1:-} python candidate
    if [[ ! -x .venv/bin/python ]]; then
        for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
            python=$(command -v "$candidate" || true)
            if [[ -n $python ]] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then break; fi
            python=
        done
        if [[ -z $python ]]; then
            echo "distgpt: error: no Python 3.11 or newer was found: install one" >&2
            exit 2
        fi
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    local wanted installed=.venv/distgpt-installed
    wanted="$extras $(cat pyproject.toml requirements.lock | cksum)"
    # Not from the start of the line: what was installed with extras serves without them, too.
    if ! grep -qF "$wanted" "$installed" 2>/dev/null; then
        echo "installing the pinned packages into .venv (PyTorch is large: this can take minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --constraint requirements.lock --editable ".[parquet,zstd${extras:+,$extras}]"
        echo "$wanted" >>"$installed"
    fi
    PATH=$PWD/.venv/bin:$PATH
}

# default_ranks: one for each GPU that CUDA would see, else two, which share the cores, or one on a single core.
default_ranks() {
    local gpus cores visible
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
        gpus=${#visible[@]}
    else
        gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
    fi
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    echo $((gpus > 0 ? gpus : cores > 1 ? 2 : 1))
}
