"""The inference plan of a batch of images: windows, batches, resampling weights.

A canvas is a scaled image with its padding: windows are cut from it, and the network's scores are added up on it. Sizes and
positions are passed as data, and only upper bounds of the sizes (see `bucket`) become compiled shapes. In whole-image
inference, a window is a whole canvas. Only the network is compiled for its exact size; for all other steps, the window lies at
the top left of a frame, whose size is an upper bound.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pspnet_jax.infer.protocols import Protocol
from pspnet_jax.infer.resample import ResamplingWeights

STRIP = 32  # rows of an image that are processed at a time, with K scores per pixel

WindowCounts = collections.Counter[tuple[int, int]]  # number of windows by their size
MaxWindows = Callable[[tuple[int, int]], int]  # window size -> maximum number of windows per device and forward pass
ToImage = tuple[ResamplingWeights, ResamplingWeights]  # [M, H, T] and [M, W, T], see canvas_to_image


class Axis(NamedTuple):
    """The rows or the columns of one view of an image; sizes in pixels."""

    source: int  # size of the image
    scaled: int  # size of the scaled image
    flipped: bool  # whether the canvas holds the flipped image
    canvas: int  # the larger of scaled and window
    before: int  # padding before the scaled image
    window: int
    starts: list[int]  # first pixel of each window on the canvas


class View(NamedTuple):
    """One image at one scale, flipped or not."""

    rows: Axis
    columns: Axis

    @property
    def window(self) -> tuple[int, int]:
        return self.rows.window, self.columns.window

    @property
    def num_windows(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)


Window = tuple[int, tuple[int, int, int], np.ndarray]  # index of the view, position as in Batch, pixels [h, w, C]


class Batch(NamedTuple):
    """Windows of one size. Each of D devices has N / D windows of its own images, ordered by view; missing windows are 0."""

    window: tuple[int, int]  # h, w
    pixels: np.ndarray  # f32[N, y, x, C], values as in the images: the windows in frames
    positions: np.ndarray  # int32[N, 3]: index of the image on its device, first row and first column on the canvas
    parts: list[tuple[int, np.ndarray]]  # for each view: its index, and the range of its windows on each device, int32[D, 2]


class Canvas(NamedTuple):
    """The array that holds the canvases of all images for one view."""

    size: tuple[int, int]  # large enough for every image
    num_windows: int
    to_image: ToImage


class Plan(NamedTuple):
    """The inference plan of a batch of images."""

    shape: tuple[int, int, int]  # number M, height H and width W of the images, rounded up
    rows: np.ndarray  # int32[M]: where the images are in arrays [M, ...], and then the unused rows
    canvases: list[Canvas]  # by view
    batches: Iterator[Batch]  # made lazily
    held: int  # number of views kept until the end: all, if they take no more memory than a running sum, else 1


def plan_images(images: Sequence[np.ndarray], protocol: Protocol, devices: int, max_windows: MaxWindows) -> Plan:
    """Plans the inference of images [H, W, C], which are divided among the devices."""
    per_device = power_of_two(ceil_div(len(images), devices))
    shape = (devices * per_device, *bucket(*(max(image.shape[i] for image in images) for i in (0, 1))))
    views = [views_of(image.shape[0], image.shape[1], protocol) for image in images]
    windows = [count_windows(of_image) for of_image in views]
    shares = divide(windows, devices)
    row_of = {image: i * per_device + j for i, share in enumerate(shares) for j, image in enumerate(share)}
    rows = [row_of[image] for image in range(len(images))]
    rows += sorted(set(range(shape[0])).difference(rows))
    canvases = [_canvas(of_images, rows, shape, protocol) for of_images in zip(*views, strict=True)]
    areas = [canvas.size[0] * canvas.size[1] for canvas in canvases]
    held = len(areas) if sum(areas) <= shape[1] * shape[2] + max(areas) else 1
    batches = _batches(images, views, protocol, shares, schedule(windows, shares, max_windows))
    return Plan(shape, np.array(rows, np.int32), canvases, batches, held)


def divide(windows: Sequence[WindowCounts], devices: int) -> list[list[int]]:
    """Divides images among the devices: the one with the most windows first, each to the device with the fewest so far.

    Returns:
      The indices of each device's images. No device has more than ceil(images / devices), rounded up to a power of two.
    """
    totals, room = [counts.total() for counts in windows], power_of_two(ceil_div(len(windows), devices))
    shares, loads = [list[int]() for _ in range(devices)], [0] * devices
    for image in sorted(range(len(totals)), key=lambda image: -totals[image]):
        device = min((i for i in range(devices) if len(shares[i]) < room), key=lambda i: loads[i])
        shares[device].append(image)
        loads[device] += totals[image]
    return [sorted(share) for share in shares]


def schedule(
    windows: Sequence[WindowCounts], shares: Sequence[Sequence[int]], max_windows: MaxWindows
) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Yields, for each window size: the size, the number of windows per device and forward pass, and the number of passes."""
    for size in dict.fromkeys(itertools.chain(*windows)):
        most = max(sum(windows[i][size] for i in share) for share in shares)  # windows on one device
        n = min(max_windows(size), power_of_two(most))
        yield size, n, ceil_div(most, n)


def views_of(height: int, width: int, protocol: Protocol) -> list[View]:
    """Returns the views of an image, with the positions of their windows."""
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
    """Returns the first pixel of each window. Windows are `stride` apart, and the last one ends at `size` (>= window).

    Stride 0 means two thirds of the window, rounded up, as in the authors' code.
    """
    stride = stride or ceil_div(2 * window, 3)
    return [min(start, size - window) for start in range(0, size - window + stride, stride)]


def _canvas(views: Sequence[View], rows: Sequence[int], shape: tuple[int, int, int], protocol: Protocol) -> Canvas:
    axes = list(zip(*views, strict=True))  # all rows, all columns
    largest = canvas_size(*(max(axis.canvas for axis in of_images) for of_images in axes))
    size = tuple(map(max, largest, *(frame_size(view.window, protocol) for view in views)))
    to_rows, to_columns = (
        _stack([canvas_to_image(axis, protocol) for axis in of_images], rows, size)
        for of_images, size in zip(axes, shape[1:], strict=True)
    )
    return Canvas(size, sum(view.num_windows for view in views), (to_rows, to_columns))


def canvas_to_image(axis: Axis, protocol: Protocol) -> ResamplingWeights:
    """Returns weights that resample sums over windows on the canvas to averages over windows at the image's size."""
    indices, weight = protocol.weights_to_image(axis.source, axis.scaled)
    indices = axis.before + (axis.scaled - 1 - indices if axis.flipped else indices)
    num_covering = np.zeros(axis.canvas, np.float32)
    for start in axis.starts:
        num_covering[start : start + axis.window] += 1
    return ResamplingWeights(indices, weight / num_covering[indices])


def _stack(weights: Sequence[ResamplingWeights], rows: Sequence[int], size: int) -> ResamplingWeights:
    """Stacks weights [n, T] of different n and T into [M, size, T], padded with 0; T is rounded up to a power of two."""
    shape = (len(rows), size, power_of_two(max(one.indices.shape[1] for one in weights)))
    stacked = ResamplingWeights(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    for row, one in zip(rows, weights, strict=False):
        for target, source in zip(stacked, one, strict=True):
            target[row, : source.shape[0], : source.shape[1]] = source
    return stacked


def _batches(
    images: Sequence[np.ndarray],
    views: list[list[View]],
    protocol: Protocol,
    shares: Sequence[Sequence[int]],
    scheduled: Iterable[tuple[tuple[int, int], int, int]],
) -> Iterator[Batch]:
    """Makes batches of one window size, as `schedule` yields them; each device gets windows of its own images."""
    sizes = list(dict.fromkeys(view.window for of_images in zip(*views, strict=True) for view in of_images))  # by view
    for size, n, passes in sorted(scheduled, key=lambda item: sizes.index(item[0])):
        queues = [_windows([images[i] for i in share], [views[i] for i in share], size, protocol) for share in shares]
        for _ in range(passes):
            shape = (*frame_size(size, protocol), len(protocol.mean))
            yield _batch([list(itertools.islice(queue, n)) for queue in queues], n, size, shape)


def _windows(
    images: Sequence[np.ndarray], views: list[list[View]], size: tuple[int, int], protocol: Protocol
) -> Iterator[Window]:
    """Yields the windows of one size, ordered by view; only one canvas exists at a time."""
    for number, of_images in enumerate(zip(*views, strict=True)):
        for i, (image, view) in enumerate(zip(images, of_images, strict=True)):
            if view.window == size:
                canvas = image_to_canvas(image, view, protocol)
                for y, x in itertools.product(view.rows.starts, view.columns.starts):
                    yield number, (i, y, x), canvas[y : y + size[0], x : x + size[1]]


def image_to_canvas(image: np.ndarray, view: View, protocol: Protocol) -> np.ndarray:
    """Returns a view's canvas [h, w, C]: float32 or, if nothing is padded, possibly the image's type."""
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


def count_windows(views: Iterable[View]) -> WindowCounts:
    """Counts windows by their size."""
    counts: WindowCounts = collections.Counter()
    for view in views:
        counts[view.window] += view.num_windows
    return counts


def _batch(by_device: list[list[Window]], n: int, size: tuple[int, int], frame: tuple[int, int, int]) -> Batch:
    """Stacks up to n windows per device."""
    pixels = np.zeros((len(by_device) * n, *frame), np.float32)
    positions = np.zeros((len(by_device) * n, 3), np.int32)
    for device, windows in enumerate(by_device):
        for i, (_, position, window) in enumerate(windows, device * n):
            pixels[i, : size[0], : size[1]], positions[i] = window, position
    views = [[view for view, _, _ in windows] for windows in by_device]
    parts = [
        (view, np.array([np.searchsorted(own, (view, view + 1)) for own in views], np.int32))
        for view in sorted(set(itertools.chain(*views)))
    ]
    return Batch(size, pixels, positions, parts)


def frame_size(window: tuple[int, int], protocol: Protocol) -> tuple[int, int]:
    """Returns the size of a window's frame: the window's size, which is rounded up in whole-image inference."""
    return canvas_size(*window) if protocol.settings.inference == "whole" else window


def canvas_size(height: int, width: int) -> tuple[int, int]:
    """Rounds a canvas's size up to a bucket plus 1, because Caffe's scaled sizes are round numbers plus 1."""
    height, width = bucket(max(1, height - 1), max(1, width - 1))
    return height + 1, width + 1


def bucket(height: int, width: int) -> tuple[int, int]:
    """Rounds a size up, so that many sizes share few compiled shapes.

    The long side is rounded up to one of four lengths per power of two. Each side is then rounded up to all, 3/4, 1/2, 1/4,
    1/8 and so on of that length, and to a multiple of STRIP.
    """
    longer = max(height, width)
    step = max(STRIP, power_of_two(longer) // 8)
    long = ceil_div(longer, step) * step

    def share(side: int) -> int:
        if long < 2 * side:
            return ceil_div((3 if 4 * side <= 3 * long else 4) * long, 4 * STRIP) * STRIP
        return ceil_div(long, power_of_two(long // side + 1) // 2 * STRIP) * STRIP

    return share(height), share(width)


def power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
