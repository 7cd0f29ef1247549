"""Find a rank whose machine computes wrongly, without an error: silent data corruption.

Every health.check_every steps each rank computes the last micro-batch of the next rank as well. With exact gradients
the results of two ranks are the same to the bit, unless the memory or processor of one of them is faulty. To tell which
one, all ranks then compute a disputed micro-batch, and the majority is right.

Hochschild et al. 2021, "Cores that don't count"; Dixit et al. 2021, arXiv:2102.11245.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distgpt.config import Config
from distgpt.corpus.loader import MicroBatch
from distgpt.distributed.collectives import hosts_of_ranks
from distgpt.distributed.gradients import ExactGradients, Gradients
from distgpt.errors import DataError
from distgpt.training.step import differentiate


class CrossCheck:
    """The checks of a run, or none if it asks for none. All ranks make the same calls."""

    def __init__(self, gradients: Gradients, config: Config, *, first_step: int) -> None:
        self._gradients, self._seed = gradients, config.run.seed
        self._every, self._passed = config.health.check_every, 0
        self._prepare(first_step)

    def compare(self, step: int, micro_batch: MicroBatch) -> None:
        """Compare what the ranks computed in a step, if it is due. `micro_batch`: the last one of this rank.

        Raises DataError on all ranks, and names the rank and host that computes wrongly.
        """
        if self._is_due(step):
            assert isinstance(self._gradients, ExactGradients)
            self._compare(self._gradients, step, torch.stack(micro_batch))
        self._prepare(step + 1)

    def _compare(self, gradients: ExactGradients, step: int, micro_batch_2BT: Tensor) -> None:
        runtime = gradients.plan.runtime
        ranks, following = runtime.world_size, (runtime.rank + 1) % runtime.world_size
        micro_batches = _from_all_ranks(micro_batch_2BT, ranks)
        assert gradients.digest is not None
        own = gradients.digest
        of_next = self._compute(gradients, step, micro_batches, following)
        table = _from_all_ranks(torch.stack((own, of_next)), ranks).tolist()
        first = [own for own, _ in table]
        second = [table[rank - 1][1] for rank in range(ranks)]  # of the same micro-batches
        disputed = [rank for rank in range(ranks) if first[rank] != second[rank]]
        if not disputed:
            self._passed = step
            return
        votes = _from_all_ranks(self._compute(gradients, step, micro_batches, disputed[0]), ranks).tolist()
        results = [(rank, vote) for rank, vote in enumerate(votes)]
        results += [(disputed[0], first[disputed[0]]), ((disputed[0] - 1) % ranks, second[disputed[0]])]
        raise DataError(self._explain(step, wrong_ranks(results), hosts_of_ranks(runtime)))

    def _prepare(self, step: int) -> None:
        """Let the gradients of the step that begins be hashed, if they are to be compared."""
        if isinstance(self._gradients, ExactGradients):
            self._gradients.digests(self._is_due(step))

    def _is_due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def _compute(self, gradients: ExactGradients, step: int, micro_batches: Tensor, rank: int) -> Tensor:
        """Compute the last micro-batch of a rank and return a digest of its gradients."""
        x_BT, y_BT = micro_batches[rank]
        index = (rank + 1) * gradients.plan.accumulation - 1
        return gradients.digest_of(lambda: differentiate(gradients, (x_BT, y_BT), step, index, seed=self._seed))

    def _explain(self, step: int, wrong: Sequence[int], hosts: Sequence[str]) -> str:
        named = " and ".join(f"rank {rank} on {hosts[rank]}" for rank in wrong)
        since = f"checkpoints after step {self._passed} may be wrong" if self._passed else "no earlier check has passed"
        if len(wrong) == 1:
            fault = f"{named} computes other gradients in step {step} than it did before or than other ranks do"
            return f"{fault}: {since}; leave out this machine, and check its memory and processor"
        return (
            f"{named} compute different gradients from the same data in step {step}: {since}; one of the machines "
            "is faulty, or their processors or versions of PyTorch differ"
        )


def wrong_ranks(results: Sequence[tuple[int, int]]) -> list[int]:
    """Return the ranks with a result that is not that of the majority; all ranks if there is no majority."""
    (most, count), *_ = Counter(result for _, result in results).most_common(1)
    majority = 2 * count > len(results)
    return sorted({rank for rank, result in results if not majority or result != most})


def _from_all_ranks(tensor: Tensor, ranks: int) -> Tensor:
    """Return the tensors of all ranks, stacked."""
    gathered = [torch.empty_like(tensor) for _ in range(ranks)] if ranks > 1 else [tensor]
    if ranks > 1:
        dist.all_gather(gathered, tensor)
    return torch.stack(gathered)
