"""Launchers and the signals that a person or a scheduler sends them."""

import os
import signal
import subprocess
import sys
import time

from tests import jobs

# The child prints its signals, and ends at SIGQUIT alone, as a torchrun does whose ranks cannot save.
SUPERVISED = """
import sys
from distgpt.launch.agent import Supervisor
child = '''
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print("saving", flush=True))
signal.signal(signal.SIGINT, lambda *_: print("never", flush=True))
signal.signal(signal.SIGQUIT, lambda *_: sys.exit(3))
print("up", flush=True)
while True:
    time.sleep(60)
'''
sys.exit(Supervisor().run([sys.executable, "-c", child], stopped_limit=600))
"""


@jobs.linux_only
def test_a_ctrl_c_that_is_clearly_typed_again_ends_it_at_once() -> None:
    """Two at once, as a terminal and a wrapper may send them, are one."""
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISED],
        stdout=subprocess.PIPE,
        text=True,
        cwd=jobs.PROJECT,
        env=jobs.environment(),
        start_new_session=True,
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "up\n"
        first = time.monotonic()
        os.killpg(script.pid, signal.SIGINT)
        assert script.stdout.readline() == "saving\n"

        def ended_by_another() -> bool:
            if script.poll() is None:
                os.killpg(script.pid, signal.SIGINT)
                time.sleep(0.1)
            return script.poll() is not None

        jobs.poll(ended_by_another)
        assert time.monotonic() - first > 1, "it took the same one for another"
        assert (script.returncode, script.stdout.read()) == (3, "")
