# Sourced by the scripts beside it. Makes .venv in the project ($home), with distgpt and its pinned packages, unless it is
# there. Does not change the working directory, since paths among the options are relative to it.
# shellcheck shell=bash
set -euo pipefail
# Import no modules from the working directory: it may hold another distgpt, or a random.py.
export PYTHONSAFEPATH=1
home=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# environment [EXTRA,...]: install the packages, and put .venv on the PATH. Installs again only when the requirements
# change, so that a later start needs no network. DISTGPT_TORCH=VERSION takes that torch, in an environment of its own.
environment() {
    local extras=${1:-} venv=$home/.venv${DISTGPT_TORCH:+-torch-$DISTGPT_TORCH} wanted
    wanted="$extras $(cat "$home/pyproject.toml" "$home/requirements.lock" | cksum)"
    # $wanted may be the end of a line: an installation with extras also serves a script that needs none.
    if [[ ! -x $venv/bin/python ]] || ! grep -qF "$wanted" "$venv/distgpt-installed" 2>/dev/null; then
        # A venv whose creation was interrupted has python, but no pip.
        "$venv/bin/pip" --version &>/dev/null || make_venv "$venv"
        echo "installing the pinned packages into ${venv##*/} (PyTorch is large: this can take minutes)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint <(sed "${DISTGPT_TORCH:+s/^torch==.*/torch==$DISTGPT_TORCH/}" "$home/requirements.lock") --editable "${home}[all${extras:+,$extras}]"
        echo "$wanted" >>"$venv/distgpt-installed"
    fi
    PATH=$venv/bin:$PATH
}

# make_venv DIR: with the first Python that is new enough.
make_venv() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "making .venv with $("$candidate" --version)"
            rm -f "$1/distgpt-installed"
            "$candidate" -m venv "$1"
            return
        fi
    done
    echo "distgpt: error: no Python 3.11 or newer was found: install one" >&2
    exit 2
}
