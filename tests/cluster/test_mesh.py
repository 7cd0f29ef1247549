"""The size of a shard group. The meshes themselves are at work in tests/end_to_end."""

import pytest

from distgpt.cluster.mesh import shard_group_size
from distgpt.errors import UsageError


def test_shard_group_is_as_asked_or_a_node() -> None:
    assert shard_group_size(shard=0, world_size=16, local_world_size=8) == 8
    assert shard_group_size(shard=2, world_size=16, local_world_size=8) == 2
    assert shard_group_size(shard=16, world_size=16, local_world_size=8) == 16


@pytest.mark.parametrize("shard", [5, 24])
def test_a_group_that_does_not_divide_names_those_that_do(shard: int) -> None:
    with pytest.raises(UsageError, match=f"parallel.shard is {shard}, .* 12 ranks: take 1 or 2 or 3 or 4 or 6 or 12$"):
        shard_group_size(shard=shard, world_size=12, local_world_size=8)
