"""The order of the training examples: shuffled epochs, mixed datasets, and rare classes more often.

Every random choice is a function of the seed and the position (or epoch, or block), so training can resume at any step.
"""

import functools
from collections.abc import Sequence

import numpy as np

from pspnet_jax.errors import UserError

MIXTURE, EPOCH, BALANCE, AUGMENT, EXTRA = range(5)  # purposes of random numbers, each with a stream of its own
BLOCK = 1000  # positions in which each dataset has exactly its share


def generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """Returns a random generator that depends only on these arguments."""
    return np.random.Generator(np.random.PCG64([seed % 2**64, purpose, *numbers]))


class Order:
    """The endless sequence of examples: order[position] is a pair (dataset, index).

    Each block of 1,000 positions contains every dataset in proportion to its weight, at random positions. Each dataset's
    examples come in its own shuffled epochs.
    """

    def __init__(
        self,
        seed: int,
        counts: Sequence[int],
        weights: Sequence[float] = (1.0,),
        balance: float = 0.0,
        presence: Sequence[np.ndarray] = (),
    ):
        """Sets up the order.

        Args:
          seed: of all random choices.
          counts: number of examples of each dataset.
          weights: sampling weight of each dataset, above 0, in any unit.
          balance: probability that the next example of the epoch is replaced by one of a random class: first a class is
            sampled from those in the dataset, then an example from those that contain it.
          presence: bool[count,K] for each dataset, whether an example contains a class; needed for balance.

        Raises:
          UserError: a weight amounts to less than one position in a block.
        """
        self._seed, self._counts, self._balance = seed, counts, balance
        self._quotas = _apportion(weights)
        self._examples_by_class = [[np.flatnonzero(column) for column in table.T if column.any()] for table in presence]

    def __getitem__(self, position: int) -> tuple[int, int]:
        block, offset = divmod(position, BLOCK)
        datasets = _block_datasets(self._seed, block, self._quotas)
        dataset = int(datasets[offset])
        if self._balance:
            random = generator(self._seed, BALANCE, position)
            if random.random() < self._balance:
                by_class = self._examples_by_class[dataset]
                return dataset, int(random.choice(by_class[random.integers(len(by_class))]))
        earlier = block * self._quotas[dataset] + int(np.count_nonzero(datasets[:offset] == dataset))
        epoch, offset = divmod(earlier, self._counts[dataset])
        return dataset, int(_epoch_indices(self._seed, dataset, epoch, self._counts[dataset])[offset])


def _apportion(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the number of positions in a block for each weight, by largest-remainder apportionment."""
    exact = BLOCK * np.array(weights) / np.sum(weights)
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: BLOCK - quotas.sum()]] += 1
    if quotas.min() == 0:
        raise UserError(f"dataset.mixture: the weights {tuple(weights)[1:]} and 1 must each be at least 1/{BLOCK} of their sum")
    return tuple(quotas.tolist())


@functools.lru_cache(8)
def _block_datasets(seed: int, block: int, quotas: tuple[int, ...]) -> np.ndarray:
    """Returns the dataset of each position of a block."""
    return generator(seed, MIXTURE, block).permutation(np.repeat(np.arange(len(quotas)), quotas))


@functools.lru_cache(8)
def _epoch_indices(seed: int, dataset: int, epoch: int, count: int) -> np.ndarray:
    return generator(seed, EPOCH, dataset, epoch).permutation(count)
