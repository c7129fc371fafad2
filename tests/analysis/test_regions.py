"""Regions, their thickness and what they touch, on label maps small enough to count by hand."""

import numpy as np
import pytest

from pspnet_jax.analysis.regions import border_distances, fill_void, find_regions, thicknesses, touching


def grid(text: str) -> np.ndarray:
    """Reads a label map from rows of digits, in which a dot is void."""
    return np.array([[255 if value == "." else int(value) for value in row] for row in text.split()], np.uint8)


LABEL = grid("""
    11000
    11020
    00200
    ...22
""")


def test_regions_are_connected_along_diagonals_too():
    regions = find_regions(LABEL)
    assert regions.ids.tolist() == [[2, 2, 1, 1, 1], [2, 2, 1, 3, 1], [1, 1, 3, 1, 1], [0, 0, 0, 3, 3]]
    assert regions.classes[1:].tolist() == [0, 1, 2]
    assert regions.pixels[1:].tolist() == [9, 4, 4]
    assert regions.boxes[1:].tolist() == [[0, 0, 3, 5], [0, 0, 2, 2], [1, 2, 3, 3]]
    assert regions.sum(LABEL == 2)[1:].tolist() == [0, 0, 4]


def test_the_most_frequent_value_within_a_region_without_void():
    regions, other = find_regions(LABEL), np.full_like(LABEL, 255)
    assert regions.most_frequent(3, other) == 255
    other[2:, :3], other[3, 4] = 7, 6  # of region 3, one pixel is 7 and one is 6
    other[3, 3] = 6
    assert regions.most_frequent(3, other) == 6


def test_a_label_map_of_void_has_no_regions():
    regions = find_regions(np.full((3, 4), 255, np.uint8))
    assert (len(regions), regions.boxes.shape) == (1, (1, 4))


STRIPES = np.repeat(np.array([[0, 0, 0, 0, 1, 1, 1, 0, 2, 2, 0, 0]], np.uint8), 9, 0)


def test_distances_from_borders_and_thickness():
    """Stripes of 3 and 1 pixels have these thicknesses; one of 2 counts as 1, and those at the picture's edge end there."""
    distances, regions = border_distances(STRIPES), find_regions(STRIPES)
    assert distances[4].tolist() == [4, 3, 2, 1, 1, 2, 1, 1, 1, 1, 1, 2]
    assert thicknesses(regions, distances)[1:].tolist() == [4, 1, 2, 3, 1]


def test_without_a_border_distances_are_larger_than_the_image():
    assert (border_distances(np.zeros((3, 5), np.uint8)) > 5).all()


def test_pairs_that_touch_with_the_length_of_their_border():
    pairs, lengths = touching(LABEL)
    found = {(a, b): n for (a, b), n in zip(pairs.tolist(), lengths.tolist(), strict=True)}
    assert found == {
        **dict.fromkeys(((0, 1), (1, 0)), 4),
        **dict.fromkeys(((0, 2), (2, 0)), 9),
        **dict.fromkeys(((0, 255), (255, 0), (2, 255), (255, 2)), 2),
    }


@pytest.mark.parametrize(("width", "touches"), [(4, True), (10, True), (12, False)])
def test_only_narrow_strips_of_void_are_bridged(width, touches):
    label = np.full((3, width + 4), 255, np.uint8)
    label[:, :2], label[:, -2:] = 0, 1
    filled = fill_void(label)
    assert filled[1].tolist() == [0] * (2 + min(5, width // 2)) + [255] * (width - 10) + [1] * (2 + min(5, width // 2))
    assert ([0, 1] in touching(filled)[0].tolist()) is touches
