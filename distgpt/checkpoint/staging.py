"""Copy the tensors of a checkpoint to the host's memory while training goes on."""

from typing import Any

import torch
from torch.distributed.checkpoint._state_dict_stager import StateDictStager


class Stager:
    """Copies tensors into buffers that it keeps for the next save. On CUDA they are pinned, and a stream fills them."""

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        # DefaultStager of torch 2.11 can stage only once.
        self._stager = StateDictStager(pin_memory=on_cuda)
        self._stream = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Make the next copy() wait for what the device has been given so far. Call it in the thread that trains."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Return copies of a nested dict of tensors, which must not change before this returns."""
        with torch.cuda.stream(self._stream):
            copies: dict[str, Any] = self._stager.stage(tensors, non_blocking=self._stream is not None)
        if self._stream:
            self._stream.synchronize()
        return copies
