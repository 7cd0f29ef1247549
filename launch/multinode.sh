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
exec python -m distgpt.launch nodes "$@"
