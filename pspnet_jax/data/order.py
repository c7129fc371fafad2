"""Which example each position of the training sequence shows: shuffled epochs, mixed datasets, rare classes more often.

Every choice is a function of the seed and the position (or epoch, or block), so that training can go on anywhere at once.
"""

import functools
from collections.abc import Sequence

import numpy as np

from pspnet_jax.errors import UserError

MIXTURE, EPOCH, BALANCE, AUGMENT = range(4)  # what a choice is for, so that no two use the same random numbers
BLOCK = 1000  # positions in which every dataset has its share to the last position


def generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """Returns random numbers that depend on these arguments and nothing else."""
    return np.random.Generator(np.random.PCG64([seed % 2**64, purpose, *numbers]))


class Order:
    """The endless sequence of examples: order[position] is the (dataset, index) shown there.

    Each block of 1,000 positions has every dataset in proportion to its weight, at random places; there its examples follow
    in shuffled epochs of its own.
    """

    def __init__(
        self,
        seed: int,
        counts: Sequence[int],
        weights: Sequence[float] = (1.0,),
        balance: float = 0.0,
        presence: Sequence[np.ndarray] = (),
    ):
        """Sets the order up.

        Args:
          seed: of everything random here.
          counts: number of examples of each dataset.
          weights: of each dataset, above 0, in any unit.
          balance: probability that a position shows, instead of the next example of the epoch, one that holds a class: the
            class is sampled from those that the dataset has anywhere, the example from those that hold it.
          presence: bool[count,K] of each dataset, which classes an example holds; needed for balance.

        Raises:
          UserError: a weight is less than one position in a block.
        """
        self._seed, self._counts, self._balance = seed, counts, balance
        self._quotas = _apportion(weights)
        self._holders = [[np.flatnonzero(column) for column in table.T if column.any()] for table in presence]

    def __getitem__(self, position: int) -> tuple[int, int]:
        block, place = divmod(position, BLOCK)
        datasets = _block(self._seed, block, self._quotas)
        dataset = int(datasets[place])
        if self._balance:
            random = generator(self._seed, BALANCE, position)
            if random.random() < self._balance:
                holders = self._holders[dataset]
                return dataset, int(random.choice(holders[random.integers(len(holders))]))
        earlier = block * self._quotas[dataset] + int(np.count_nonzero(datasets[:place] == dataset))
        epoch, place = divmod(earlier, self._counts[dataset])
        return dataset, int(_epoch(self._seed, dataset, epoch, self._counts[dataset])[place])


def _apportion(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the number of positions in a block for each weight, by largest-remainder apportionment."""
    exact = BLOCK * np.array(weights) / np.sum(weights)
    quotas = np.floor(exact).astype(int)
    quotas[np.argsort(quotas - exact, kind="stable")[: BLOCK - quotas.sum()]] += 1
    if quotas.min() == 0:
        raise UserError(f"dataset.mixture: weights {tuple(weights)[1:]} beside 1: each must be 1/{BLOCK} of their sum or more")
    return tuple(quotas.tolist())


@functools.lru_cache(8)
def _block(seed: int, block: int, quotas: tuple[int, ...]) -> np.ndarray:
    """The dataset of each position of a block."""
    return generator(seed, MIXTURE, block).permutation(np.repeat(np.arange(len(quotas)), quotas))


@functools.lru_cache(8)
def _epoch(seed: int, dataset: int, epoch: int, count: int) -> np.ndarray:
    return generator(seed, EPOCH, dataset, epoch).permutation(count)
