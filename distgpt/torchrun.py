"""What torchrun's environment says of this process. Imports no torch."""

import os
from dataclasses import dataclass

from distgpt.errors import UsageError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """The place of this process among those of its job."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def place_in_job() -> Place:
    """The place that a launcher gave to this process, alone without one. Raises UsageError where it makes no sense."""
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    listed = " ".join(f"{name}={value}" for name, value in given.items())
    unset = f"unset {' '.join(given)}, or start it with torchrun"
    if not all(value.isdecimal() for value in given.values()):
        raise UsageError(f"the environment has {listed}, which must be whole numbers: {unset}")
    place = Place(**{name.lower(): int(value) for name, value in given.items()})
    if place != Place() and not ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ):
        raise UsageError(f"the environment has {listed}, but no launcher started this process: {unset}")
    if place.rank >= place.world_size or place.local_rank >= place.local_world_size:
        raise UsageError(f"the environment has {listed}, which is no rank of a job: {unset}")
    return place
