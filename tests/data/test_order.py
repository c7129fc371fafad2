"""The order of the examples: epochs, mixtures and balance, each checked against its definition."""

import numpy as np
import pytest

from pspnet_jax.data.order import BLOCK, Order


def shown(order, positions):
    return np.array([order[position] for position in positions])


def test_each_epoch_has_every_example_once_in_a_new_order():
    order = shown(Order(0, [7]), range(8 * 7))
    assert (order[:, 0] == 0).all()
    rows = order[:, 1].reshape(8, 7)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(7), (8, 1)))
    assert len({tuple(row) for row in rows}) == 8  # 8 of 7! = 5040


def test_a_position_does_not_depend_on_earlier_access():
    mixed = {"counts": [7, 5], "weights": (1, 0.3), "balance": 0.5, "presence": [np.eye(7, dtype=bool), np.eye(5, dtype=bool)]}
    positions = [10**12, 3, 2 * BLOCK + 1, 0, 10**12 + 1]
    expected = {p: Order(3, **mixed)[p] for p in positions}
    sequential = Order(3, **mixed)
    shown(sequential, range(2 * BLOCK + 2))
    assert {p: sequential[p] for p in positions} == expected


@pytest.mark.parametrize("seed", [1, 2, -1])
def test_the_order_depends_only_on_the_seed(seed):
    mixed = {"counts": [50, 50], "weights": (1, 1)}
    first, other = (shown(Order(s, **mixed), range(200)) for s in (0, seed))
    np.testing.assert_array_equal(shown(Order(seed, **mixed), range(200)), other)
    assert (first[:, 0] != other[:, 0]).mean() > 0.3  # two random sequences differ at half of the positions
    assert (first != other).any(axis=1).mean() > 0.9


@pytest.mark.parametrize(
    ("weights", "quotas"), [((1.0,), [1000]), ((1, 1, 1), [334, 333, 333]), ((1, 0.5), [667, 333]), ((1, 0.0011), [999, 1])]
)
def test_every_block_of_1000_has_each_dataset_in_proportion_to_its_weight(weights, quotas):
    order = Order(0, [11] * len(weights), weights)
    for block in (0, 1, 7):
        datasets = shown(order, range(block * BLOCK, (block + 1) * BLOCK))[:, 0]
        assert np.bincount(datasets).tolist() == quotas


def test_each_dataset_of_a_mixture_has_its_own_epochs():
    order = shown(Order(0, [7, 450], (1, 2)), range(5 * BLOCK))
    for dataset, count in enumerate((7, 450)):
        indices = order[order[:, 0] == dataset, 1]
        epochs = indices[: len(indices) // count * count].reshape(-1, count)
        assert len(epochs) == (237, 7)[dataset]  # 5 * 333 positions / 7, and 5 * 667 / 450
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(count), (len(epochs), 1)))
    places = np.flatnonzero(order[:, 0] == 0)
    assert np.diff(places).max() > 10  # at random positions, not at every third


def test_a_weight_below_one_position_in_a_block_is_an_error():
    with pytest.raises(
        ValueError, match=r"dataset.mixture: the weights \(0.0004,\) and 1 must each be at least 1/1000 of their sum"
    ):
        Order(0, [5, 5], (1, 0.0004))


def test_balance_shows_every_class_equally_often():
    """Of 10 examples, all contain class 0, none class 1, two class 2, and one class 3."""
    presence = np.zeros((10, 4), bool)
    presence[:, 0] = presence[4:6, 2] = presence[9, 3] = True
    share = 0.6
    order = Order(0, [10], balance=share, presence=[presence])
    counts = np.bincount(shown(order, range(6000))[:, 1], minlength=10) / 6000
    class_of_three = (np.full(10, 0.1) + presence[:, 2] / 2 + presence[:, 3]) / 3
    expected = (1 - share) / 10 + share * class_of_three
    print("shares", counts.round(3), "expected", expected.round(3))
    np.testing.assert_allclose(counts, expected, atol=4 * np.sqrt(0.25 / 6000))
    assert expected[9] > 4 * expected[0]


def test_without_balance_the_classes_do_not_change_the_order():
    presence = [np.eye(9, dtype=bool)]
    np.testing.assert_array_equal(shown(Order(0, [9], presence=presence), range(99)), shown(Order(0, [9]), range(99)))
