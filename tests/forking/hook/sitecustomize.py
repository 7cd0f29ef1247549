"""For the PYTHONPATH of scripts under test, after the project.

torchrun is forked by the server of the tests; without FORK_SERVER it runs here, and forks its ranks.
"""

import os
import sys

# Its place in the command line: python [-u] .../torchrun, or python -m torch.distributed.run.
_launcher = 2 if sys.orig_argv[1][:1] == "-" else 1
if not sys.orig_argv[_launcher].endswith(("/torchrun", "torch.distributed.run")):
    _launcher = 0
if _launcher and os.environ.get("FORK_SERVER"):
    from tests.forking.relay import relay

    try:
        relay(os.environ["FORK_SERVER"], sys.orig_argv[_launcher + 1 :])
    finally:
        os._exit(70)  # Python would go on after an error here
elif _launcher:
    from tests.forking.ranks import fork_ranks

    fork_ranks()
