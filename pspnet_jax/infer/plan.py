"""The inference plan of a batch of images: windows, batches, resampling weights.

A canvas is a scaled image and its padding, from which windows are cut, and on which the network's scores are accumulated.
Sizes and places travel as numbers, and only upper bounds of them (`bucket`) are shapes that have to be compiled; but for the
network, which whole inference compiles for each size: there a window lies at the top left of a frame of a bucket's size.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pspnet_jax.infer.protocols import Protocol
from pspnet_jax.infer.resample import ResamplingWeights

STRIP = 32  # rows of an image that are finished at a time, K numbers a pixel

ToImage = tuple[ResamplingWeights, ResamplingWeights]  # [M, H, T] and [M, W, T], see canvas_to_image


class Axis(NamedTuple):
    """Rows, or columns, of one image in one view."""

    source: int  # pixels of the image
    scaled: int
    flipped: bool  # the canvas, with its windows, is that of the flipped image
    canvas: int  # the scaled image, or the window where that is larger
    before: int  # pixels of padding before the scaled image
    window: int
    starts: list[int]  # of the windows on the canvas


class View(NamedTuple):
    """One image at one scale, and flipped or not."""

    rows: Axis
    columns: Axis

    @property
    def window(self) -> tuple[int, int]:
        return self.rows.window, self.columns.window

    @property
    def num_windows(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)


Window = tuple[int, tuple[int, int, int], np.ndarray]  # view, place, pixels [h, w, 3] in gray levels


class Batch(NamedTuple):
    """Windows of one size for the network; each of D devices has N / D of its own images, ordered by view, then zeros."""

    window: tuple[int, int]  # h, w
    pixels: np.ndarray  # f32[N, y, x, 3], in gray levels: the windows in frames
    places: np.ndarray  # int32[N, 3]: image on its device, first row and column on the canvas
    parts: list[tuple[int, np.ndarray]]  # a view and, int32[D, 2], from and up to which window a device has it


class Canvas(NamedTuple):
    """One view of all images."""

    size: tuple[int, int]  # holds those of all images
    num_windows: int
    to_image: ToImage


class Plan(NamedTuple):
    """All there is to do for some images; their number M, height H and width W are rounded up to bounds."""

    shape: tuple[int, int, int]  # M, H, W
    canvases: list[Canvas]  # by view
    batches: Iterator[Batch]  # made one by one, as they are asked for
    held: int  # views held until the end: all, where that takes less memory than adding them up one by one, else the last


def plan_images(images: Sequence[np.ndarray], protocol: Protocol, devices: int) -> Plan:
    """Plans images uint8[H, W, 3] that are shared out among devices."""
    per_device = power_of_two(ceil_div(len(images), devices))
    shape = (devices * per_device, *bucket(*(max(image.shape[i] for image in images) for i in (0, 1))))
    views = [views_of(image.shape[0], image.shape[1], protocol) for image in images]
    canvases = [_canvas(of_images, shape, protocol) for of_images in zip(*views, strict=True)]
    areas = [canvas.size[0] * canvas.size[1] for canvas in canvases]
    held = len(areas) if sum(areas) <= shape[1] * shape[2] + max(areas) else 1
    return Plan(shape, canvases, _batches(images, views, protocol, devices, per_device), held)


def views_of(height: int, width: int, protocol: Protocol) -> list[View]:
    """Returns the views of an image, and where their windows lie."""
    settings = protocol.settings
    flips = (False, True) if settings.flip and protocol.flips_views else (False,)
    views = []
    for scale, flipped in itertools.product(settings.scales, flips):
        scaled = protocol.scaled_size(height, width, scale)
        crop = scaled if settings.inference == "whole" else settings.crop
        rows, columns = zip((height, width), scaled, (False, flipped), crop, settings.stride, strict=True)
        views.append(View(_axis(*rows, protocol), _axis(*columns, protocol)))
    return views


def _axis(source: int, scaled: int, flipped: bool, crop: int, stride: int, protocol: Protocol) -> Axis:
    window, before = protocol.window(crop, scaled)
    canvas = max(scaled, window)
    return Axis(source, scaled, flipped, canvas, before, window, window_starts(canvas, window, stride))


def window_starts(size: int, window: int, stride: int = 0) -> list[int]:
    """Returns each window's first pixel, for `size` >= window pixels: `stride` apart, the last flush with the end.

    Stride 0 is two thirds of the window, rounded up, as the authors have it.
    """
    stride = stride or ceil_div(2 * window, 3)
    return [min(start, size - window) for start in range(0, size - window + stride, stride)]


def _canvas(views: Sequence[View], shape: tuple[int, int, int], protocol: Protocol) -> Canvas:
    axes = list(zip(*views, strict=True))  # all rows, all columns
    largest = _rounded_up(*(max(axis.canvas for axis in of_images) for of_images in axes))
    size = tuple(map(max, largest, *(_frame(view.window, protocol) for view in views)))
    rows, columns = (
        _stack([canvas_to_image(axis, protocol) for axis in of_images], shape[0], size)
        for of_images, size in zip(axes, shape[1:], strict=True)
    )
    return Canvas(size, sum(view.num_windows for view in views), (rows, columns))


def canvas_to_image(axis: Axis, protocol: Protocol) -> ResamplingWeights:
    """Returns the weights that take sums over windows, on the canvas, to means over windows, on the image."""
    indices, weight = protocol.weights_to_image(axis.source, axis.scaled)
    indices = axis.before + (axis.scaled - 1 - indices if axis.flipped else indices)
    times_seen = np.zeros(axis.canvas, np.float32)
    for start in axis.starts:
        times_seen[start : start + axis.window] += 1
    return ResamplingWeights(indices, weight / times_seen[indices])


def _stack(weights: Sequence[ResamplingWeights], count: int, size: int) -> ResamplingWeights:
    """Stacks [n, T] of any n and T, with weights of 0 after them, to [count, size, T]; T becomes a power of two."""
    shape = (count, size, power_of_two(max(one.indices.shape[1] for one in weights)))
    stacked = ResamplingWeights(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    for i, one in enumerate(weights):
        for target, source in zip(stacked, one, strict=True):
            target[i, : source.shape[0], : source.shape[1]] = source
    return stacked


def _batches(
    images: Sequence[np.ndarray], views: list[list[View]], protocol: Protocol, devices: int, per_device: int
) -> Iterator[Batch]:
    """Shares all windows out among the devices, and into batches of one size."""
    shares = [slice(i * per_device, (i + 1) * per_device) for i in range(devices)]
    for size in dict.fromkeys(view.window for of_images in zip(*views, strict=True) for view in of_images):
        longest = max(count_windows(itertools.chain(*views[share]))[size] for share in shares)
        n = min(ceil_div(protocol.settings.batch_size, devices), power_of_two(longest))
        frame = _frame(size, protocol)
        queues = [_windows(images[share], views[share], size, protocol) for share in shares]
        for _ in range(ceil_div(longest, n)):
            yield _batch([list(itertools.islice(queue, n)) for queue in queues], n, size, frame)


def _windows(
    images: Sequence[np.ndarray], views: list[list[View]], size: tuple[int, int], protocol: Protocol
) -> Iterator[Window]:
    """Cuts the windows of one size, ordered by view; of the canvases, only one exists at a time."""
    for number, of_images in enumerate(zip(*views, strict=True)):
        for i, (image, view) in enumerate(zip(images, of_images, strict=True)):
            if view.window == size:
                canvas = image_to_canvas(image, view, protocol)
                for y, x in itertools.product(view.rows.starts, view.columns.starts):
                    yield number, (i, y, x), canvas[y : y + size[0], x : x + size[1]]


def image_to_canvas(image: np.ndarray, view: View, protocol: Protocol) -> np.ndarray:
    """Returns a view's canvas [h, w, 3] in gray levels, float32 or, as it may be where nothing is padded, uint8."""
    rows, columns = view
    scaled = protocol.scale(image, rows.scaled, columns.scaled)
    if columns.flipped:
        scaled = scaled[:, ::-1]
    if scaled.shape[:2] == (rows.canvas, columns.canvas):
        return scaled
    exceeds = rows.scaled > rows.window or columns.scaled > columns.window
    canvas = np.tile(protocol.padding(exceeds).astype(np.float32), (rows.canvas, columns.canvas, 1))
    canvas[rows.before : rows.before + rows.scaled, columns.before : columns.before + columns.scaled] = scaled
    return canvas


def count_windows(views: Iterable[View]) -> collections.Counter[tuple[int, int]]:
    """Counts windows by their size."""
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    for view in views:
        counts[view.window] += view.num_windows
    return counts


def _batch(by_device: list[list[Window]], n: int, size: tuple[int, int], frame: tuple[int, int]) -> Batch:
    """Stacks at most n windows a device."""
    pixels = np.zeros((len(by_device) * n, *frame, 3), np.float32)
    places = np.zeros((len(by_device) * n, 3), np.int32)
    for device, windows in enumerate(by_device):
        for i, (_, place, window) in enumerate(windows, device * n):
            pixels[i, : size[0], : size[1]], places[i] = window, place
    views = [[view for view, _, _ in windows] for windows in by_device]
    parts = [
        (view, np.array([np.searchsorted(own, (view, view + 1)) for own in views], np.int32))
        for view in sorted(set(itertools.chain(*views)))
    ]
    return Batch(size, pixels, places, parts)


def _frame(window: tuple[int, int], protocol: Protocol) -> tuple[int, int]:
    """Returns what holds a window: itself, or the least round size where each image has a window of its own."""
    return _rounded_up(*window) if protocol.settings.inference == "whole" else window


def _rounded_up(height: int, width: int) -> tuple[int, int]:
    """Rounds a canvas up; Caffe's sizes are one more than round ones."""
    height, width = bucket(max(1, height - 1), max(1, width - 1))
    return height + 1, width + 1


def bucket(height: int, width: int) -> tuple[int, int]:
    """Rounds a size up, so that many sizes share few compiled shapes.

    The long side becomes one of four lengths an octave; then each side that length, 3/4 or 1/2 of it, and a multiple of STRIP.
    """
    longer = max(height, width)
    step = max(STRIP, power_of_two(longer) // 8)
    long = ceil_div(longer, step) * step
    quarters = (max(2, ceil_div(4 * side, long)) for side in (height, width))
    height, width = (ceil_div(part * long, 4 * STRIP) * STRIP for part in quarters)
    return height, width


def power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
