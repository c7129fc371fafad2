"""Groups fill the network's batches, keep all devices equally busy, and lose no example."""

from collections import Counter

import numpy as np
import pytest

from pspnet_jax.infer.groups import AHEAD, form_groups
from pspnet_jax.infer.plan import divide, schedule


def grouped(counts, devices, max_windows, room=64, read=None):
    """Returns the groups of examples 0, 1, ..., each with a number of windows by size; appends to `read` when one is read."""

    def examples():
        for i in range(len(counts)):
            if read is not None:
                read.append(i)
            yield {"name": i}

    groups = form_groups(
        examples(), lambda example: counts[example["name"]], lambda example: room, lambda size: max_windows, devices
    )
    for group in groups:
        yield [example["name"] for example in group]


def one_size(*numbers):
    return [Counter({(9, 9): number}) for number in numbers]


def test_images_are_divided_by_their_number_of_windows():
    """9 + 3, 5 + 4 + 1 and 5 + 4 + 1 windows; in order, they would be 16, 10 and 6."""
    assert divide(one_size(1, 9, 5, 1, 4, 5, 4, 3), 3) == [[1, 7], [0, 2, 4], [3, 5, 6]]


def test_the_number_of_images_on_a_device_is_bounded():
    """Eight images on two devices: four each, although the first has more windows than all others together."""
    assert sorted(map(len, divide(one_size(99, *[1] * 7), 2))) == [4, 4]


@pytest.mark.parametrize(("numbers", "expected"), [((4,) * 5, [[0], [1], [2], [3], [4]]), ((2,) * 5, [[0, 1], [2, 3], [4]])])
def test_on_one_device_examples_stay_in_order_and_are_read_only_when_needed(numbers, expected):
    read, found = [], []
    for group in grouped(one_size(*numbers), 1, 4, read=read):
        found.append(group)
        assert len(read) <= group[-1] + 2
    assert found == expected


def test_a_group_grows_if_more_of_its_slots_are_used_then():
    """6 windows fill 6 of 8 slots, in a batch of 4; two images fill 12 of 12. With room for one only, it stays alone."""
    assert list(grouped(one_size(6, 6, 6, 6), 1, 4)) == [[0, 1], [2, 3]]
    assert list(grouped(one_size(6, 6, 6, 6), 1, 4, room=1)) == [[0], [1], [2], [3]]


def test_several_devices_get_images_of_the_same_window_sizes_if_there_are_any():
    """Sizes alternate, so that no examples in a row have the same. Those of the last group share one of two sizes."""
    counts = [Counter({(9, 9): 1}), Counter({(8, 9): 1})] * 4
    assert list(grouped(counts, 1, 1)) == [[i] for i in range(8)]
    assert list(grouped(counts, 2, 1)) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    counts[6] += Counter({(8, 8): 1})
    assert list(grouped(counts, 2, 1)) == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(
    ("devices", "max_windows", "room"), [(1, 4, 64), (1, 8, 64), (8, 1, 1), (8, 1, 64), (8, 4, 64), (8, 8, 64)]
)
def test_most_slots_are_used_whatever_the_sizes(devices, max_windows, room):
    """Images with 11 to 23 windows, as in ADE20K at six scales. In order, 8 devices would use less than 70% of the slots."""
    counts = one_size(*np.random.default_rng(0).choice([11, 14, 16, 18, 21, 23], 800).tolist())
    read, found, slots = [], [], 0
    for group in grouped(counts, devices, max_windows, room, read):
        assert len(read) - len(found) <= devices * max(AHEAD, 4 * max_windows)
        windows = [counts[i] for i in group]
        slots += sum(
            devices * n * passes for _, n, passes in schedule(windows, divide(windows, devices), lambda size: max_windows)
        )
        found += group
    assert sorted(found) == list(range(800))
    assert sum(count[9, 9] for count in counts) / slots > 0.9
