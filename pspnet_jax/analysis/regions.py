"""Regions of a label map, which are its connected components of one class: where they are, how thick, and what they touch."""

from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage

from pspnet_jax.datasets import IGNORE

BRIDGED = 5  # pixels: void strips at most twice as wide, as VOC draws them around objects, do not keep regions apart


class Regions(NamedTuple):
    """The regions of a label map, numbered from 1."""

    ids: np.ndarray  # int32[H, W], the region of each pixel; 0 where it is void
    classes: np.ndarray  # uint8[R + 1], the class of each region; that of number 0 has no meaning
    pixels: np.ndarray  # int64[R + 1], the number of its pixels
    boxes: np.ndarray  # int64[R + 1, 4], its top, left, height and width

    def __len__(self) -> int:
        return len(self.classes)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Returns the sum of values [H, W] over each region, float64[R + 1]."""
        return np.bincount(self.ids.ravel(), values.ravel(), len(self))

    def most_frequent(self, number: int, label: np.ndarray) -> int:
        """Returns the value that another label map uint8[H, W] mostly has within a region, without void; else `IGNORE`."""
        top, left, height, width = self.boxes[number]
        box = np.s_[top : top + height, left : left + width]
        counts = np.bincount(label[box][self.ids[box] == number], minlength=256)
        return int(counts[:IGNORE].argmax()) if counts[:IGNORE].any() else IGNORE


def find_regions(label: np.ndarray) -> Regions:
    """Returns the regions of a label map uint8[H, W], in which diagonal neighbors are connected."""
    ids = np.zeros(label.shape, np.int32)
    classes = [np.zeros(1, np.uint8)]
    found = 0
    for value in np.flatnonzero(np.bincount(label.ravel(), minlength=256)[:IGNORE]):
        mask = (label == value).view(np.uint8)
        left, top, width, height = cv2.boundingRect(mask)
        box = np.s_[top : top + height, left : left + width]
        # connectedComponentsWithStats takes several times as long
        count, part = cv2.connectedComponents(mask[box], connectivity=8, ltype=cv2.CV_32S)
        np.add(part, found, out=ids[box], where=part > 0)
        classes.append(np.full(count - 1, value, np.uint8))
        found += count - 1
    boxes = [(y.start, x.start, y.stop - y.start, x.stop - x.start) for y, x in ndimage.find_objects(ids)]
    pixels = np.bincount(ids.ravel(), minlength=found + 1)
    return Regions(ids, np.concatenate(classes), pixels, np.array([(0, 0, 0, 0), *boxes]))


def border_distances(label: np.ndarray) -> np.ndarray:
    """Returns each pixel's distance to the nearest border between two values (void is one), f32[H, W]; 1 beside a border.

    Without a border, all distances are larger than the image.
    """
    inside = np.ones(label.shape, np.uint8)
    rows, columns = label[1:] == label[:-1], label[:, 1:] == label[:, :-1]
    for part, same in ((inside[1:], rows), (inside[:-1], rows), (inside[:, 1:], columns), (inside[:, :-1], columns)):
        np.bitwise_and(part, same, out=part)
    distances = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_5)
    return np.minimum(distances, max(label.shape)) + 1


def thicknesses(regions: Regions, distances: np.ndarray) -> np.ndarray:
    """Returns the diameter in pixels of the largest disk within each region, at most its box's shorter side, f32[R + 1].

    `distances` are the `border_distances` of the label map.
    """
    largest = np.zeros(len(regions), np.float32)
    np.maximum.at(largest, regions.ids.ravel(), distances.ravel())
    return np.minimum(2 * largest - 1, regions.boxes[:, 2:].min(1))


def touching(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of different values of adjacent pixels, in both orders, and the length of their common border.

    The values are non-negative integers [H, W]. Returned are distinct pairs int64[n, 2], and int64[n], how many pairs of pixels
    that are neighbors in a row or column have these values.
    """
    sides = ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1]))
    base = int(values.max(initial=0)) + 1
    codes = [a[a != b].astype(np.int64) * base + b[a != b] for one, other in sides for a, b in ((one, other), (other, one))]
    distinct, lengths = np.unique(np.concatenate(codes), return_counts=True)
    return np.stack(np.divmod(distinct, base), 1), lengths


def fill_void(label: np.ndarray) -> np.ndarray:
    """Returns a label map in which void pixels have the class of the nearest labeled pixel, if it is at most `BRIDGED` away."""
    void = (label == IGNORE).astype(np.uint8)
    if not void.any() or void.all():
        return label
    distances, nearest = cv2.distanceTransformWithLabels(void, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL)
    classes = np.zeros(nearest.max() + 1, np.uint8)
    classes[nearest[void == 0]] = label[void == 0]
    return np.where(distances <= BRIDGED, classes[nearest], label)
