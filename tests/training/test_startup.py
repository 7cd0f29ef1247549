"""The checks before the first step that compare ranks."""

from dataclasses import replace

import pytest
import torch

from distgpt.config import resolve
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError
from distgpt.training import startup


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_ranks_that_would_compute_in_unlike_dtypes_are_refused(
    one_process: Runtime, monkeypatch: pytest.MonkeyPatch, own: torch.dtype
) -> None:
    plan = replace(make_plan(resolve([], {}), one_process, vocab_size=9), dtype=own)
    monkeypatch.setattr(startup, "hosts_of_ranks", lambda runtime: ["old", "new", "old"])
    for other, refused in ((1.0, own == torch.float32), (0.0, own == torch.bfloat16)):
        monkeypatch.setattr(startup, "all_gather_row", lambda row, runtime, other=other: [row, [other], row])
        if refused:
            with pytest.raises(UsageError, match=r"train.dtype=auto is float32 on (old|new) and bfloat16 elsewhere"):
                startup.require_same_dtype(plan)
        else:
            startup.require_same_dtype(plan)
