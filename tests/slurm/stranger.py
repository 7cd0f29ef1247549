"""Act as another user of the cluster: write pickles into a job's store that run a command when they are unpickled.

`python -m tests.slurm.stranger PORT PROOF`: the command makes the file PROOF. Prints how many keys there were.
"""

import base64
import os
import pickle
import sys
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from tests.strangers import Payload

NOBODY = 65534


def main(port: int, proof: str) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    pickled = pickle.dumps(Payload(f"touch '{proof}'"))
    store: Any = TCPStore(  # its set() takes bytes as well
        "127.0.0.1", port, timeout=timedelta(seconds=60), wait_for_workers=False
    )
    keys = store.list_keys()
    for key in keys:
        # torchrun's agents decode what they read under its own name.
        store.set(key, base64.b64encode(pickled) if "torch.rendezvous" in key else pickled)
    print(len(keys))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
