#!/usr/bin/env bash
# Train on several hosts without a scheduler: the same command on each of them, in any order.
#   HEAD=host:port NODES=4 launch/multinode.sh [PRESET] [--section.key=value ...]
#
#   HEAD             one of the hosts, by a name or an IPv4 address that all hosts know, and a free port on it; the
#                    preflight uses the next port
#   NODES            the number of hosts; MIN:MAX trains with MIN hosts or more, and lets further ones join later
#   NPROC_PER_NODE   ranks on each host; the default is one for each GPU, or two that share the CPU's cores
#   NUMA_BINDING     node binds each rank to the CPUs near its GPU (docs/gpu.md)
#   JOIN_SECONDS     how long to wait for the other hosts (600)
#   TRIES            attempts in a row without a new checkpoint before giving up (10)
#
# Hosts with another run.dir are another job, and wait for hosts of their own.
#
# First come the checks of python -m distgpt.doctor --distributed, then training. When a host, a rank or the network fails,
# the attempt ends on all hosts within health.timeout, and all start again from the newest checkpoint. A mistake ends the
# job at once on all hosts. A signal to this script stops the run at a saved step. This host then leaves (75), and the
# others wait for it to come back. To stop the run for good, stop the script on each host.
# Exits with the code of the run, which torchrun would turn into 1.
. "$(dirname "$0")/environment.sh"
environment ""
exec python -m distgpt.launch nodes "$@"
