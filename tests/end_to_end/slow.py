"""distgpt.train, for torchrun, with a rank slowed on purpose: $SLOW is WHAT:SECONDS:RANK, or WHAT:SECONDS: for all.

WHAT is `forward` (each forward of the model sleeps), `backward`, `read` (each sequence that is read does) or `save`.
"""

import os
import runpy
import time
from typing import Any

import torch.distributed.checkpoint as dcp

from distgpt.corpus import loader
from distgpt.model.gpt import GPT

what, seconds, rank = os.environ["SLOW"].split(":")
forward, read, write = GPT.forward, loader.WindowReader.read, dcp.FileSystemWriter.write_data


def slow_forward(self: GPT, *arguments: Any, **options: Any) -> Any:
    time.sleep(float(seconds))
    return forward(self, *arguments, **options)


def slow_backward(self: GPT, *arguments: Any, **options: Any) -> Any:
    loss = forward(self, *arguments, **options)
    loss.register_hook(sleeping)  # type: ignore[no-untyped-call]
    return loss


def sleeping(grad: Any) -> None:
    time.sleep(float(seconds))


def slow_read(self: loader.WindowReader, shards: Any, offsets: Any, tokens: Any) -> None:
    time.sleep(float(seconds) * len(offsets))
    read(self, shards, offsets, tokens)


def slow_write(self: dcp.FileSystemWriter, *arguments: Any) -> Any:
    time.sleep(float(seconds))
    return write(self, *arguments)


if rank in ("", os.environ["RANK"]):
    if what == "forward":
        GPT.forward = slow_forward  # type: ignore[method-assign]
    elif what == "backward":
        GPT.forward = slow_backward  # type: ignore[method-assign]
    elif what == "save":
        dcp.FileSystemWriter.write_data = slow_write  # type: ignore[method-assign, assignment]
    else:
        loader.CHUNK_STEPS = 4  # training waits for data sooner
        loader.WindowReader.read = slow_read  # type: ignore[method-assign]
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=True)
