"""A sitecustomize for scripts under test, through PYTHONPATH: the fork server of the tests runs their torchrun.

With FORK_LAUNCHER it runs the launcher instead, which forks its torchrun: a launcher that looks for the children of
its torchrun must be the parent of that. With FORK_COMMANDS it runs the commands of distgpt too.
"""

import os
import sys

# The index of the program in the command line: python [-u] .../torchrun, or python [-u] -m MODULE.
_program = 2 if sys.orig_argv[1][:1] == "-" else 1
_forked: tuple[str, ...] = (
    ("distgpt.launch",) if os.environ.get("FORK_LAUNCHER") else ("/torchrun", "torch.distributed.run")
)
if os.environ.get("FORK_COMMANDS"):
    from tests.forking.program import COMMANDS, PRODUCT

    _forked += tuple(f"{PRODUCT}.{command}" for command in COMMANDS)
if sys.orig_argv[_program].endswith(_forked):
    import traceback

    from tests.forking.relay import relay

    try:
        relay(os.environ["FORK_SERVER"], sys.orig_argv[_program:])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)  # Python would go on after an error here
