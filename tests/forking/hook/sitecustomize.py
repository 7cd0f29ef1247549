"""For the PYTHONPATH of scripts under test, after the project: torchrun forks its ranks, see tests/forking."""

import sys

if any(argument.endswith(("/torchrun", "torch.distributed.run")) for argument in sys.orig_argv[1:3]):
    from tests.forking.ranks import fork_ranks

    fork_ranks()
