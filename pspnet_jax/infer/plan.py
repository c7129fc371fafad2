"""What there is to do for some images, as data: sizes and places travel as taps and indices, and only upper bounds of them
(`bucket`) are shapes that have to be compiled."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.infer.layout import View, inward_taps, lay_out, outward_taps
from pspnet_jax.infer.protocols import PROTOCOLS
from pspnet_jax.infer.resample import Taps

STRIP = 32  # rows of an image that are finished at a time, K numbers a pixel


class Window(NamedTuple):
    """One window; or N of them, of one size h x w, with a leading axis."""

    place: np.ndarray  # int32[3]: image on its device, first row and column on the canvas
    rows: Taps  # [h, T], of the image; the padding has weight 0
    columns: Taps  # [w, T]
    rows_first: np.ndarray  # bool: as MATLAB has it, the axis that shrinks most (or grows least) is resized first
    padding: np.ndarray  # f32[3], a color


class Batch(NamedTuple):
    """Windows of one size for the network; each device has as many, of its own images, ordered by view."""

    windows: Window
    parts: list[tuple[int, np.ndarray]]  # a view and, int32[devices, 2], from and up to which window a device has it
    finished: list[int]  # the views that have no more windows after this batch


class Plan(NamedTuple):
    """All there is to do for some images; their number M, height H and width W are rounded up to bounds."""

    images: np.ndarray  # uint8[M, H, W, 3]
    batches: list[Batch]
    canvases: list[tuple[int, int]]  # by view: height and width that hold those of all images
    outward: list[tuple[Taps, Taps]]  # by view, rows and columns: [M, H, T] and [M, W, T]
    together: bool  # keeping all views until the end takes less memory than adding them up one by one


def plan_images(images: Sequence[np.ndarray], config: ConfigDict, devices: int) -> Plan:
    """Plans images uint8[H, W, 3] that are shared out among devices; of the config, eval, normalize and model are used."""
    protocol, corners = PROTOCOLS[config.eval.protocol], config.model.align_corners
    layouts = [lay_out(image.shape[0], image.shape[1], config.eval) for image in images]
    count = devices * power_of_two(-(-len(images) // devices))
    stacked = np.zeros((count, *_bounds([image.shape for image in images]), 3), np.uint8)
    for place, image in zip(stacked, images, strict=False):
        place[: image.shape[0], : image.shape[1]] = image
    canvases, outward = [], []
    for views in zip(*layouts, strict=True):  # one view of all images
        height, width = _bounds([(rows.canvas - 1, columns.canvas - 1) for rows, columns, _ in views])
        canvases.append((height + 1, width + 1))  # Caffe's sizes are one more than round ones
        rows = [outward_taps(view.rows, False, protocol, corners) for view in views]
        columns = [outward_taps(view.columns, view.mirrored, protocol, corners) for view in views]
        outward.append((_stack(rows, count, stacked.shape[1]), _stack(columns, count, stacked.shape[2])))
    areas = [height * width for height, width in canvases]
    together = sum(areas) <= stacked.shape[1] * stacked.shape[2] + max(areas)
    return Plan(stacked, _batches(layouts, config, devices, count // devices), canvases, outward, together)


def _batches(layouts: list[list[View]], config: ConfigDict, devices: int, images: int) -> list[Batch]:
    """Shares all windows out among the devices, each of which has so many images, and into batches."""
    todo: dict[tuple[int, int], list[list[tuple[int, Window]]]] = {}  # (view, window) by size and device
    for v in range(len(layouts[0])):
        for i, views in enumerate(layouts):
            device, slot = divmod(i, images)
            size = views[v].rows.window, views[v].columns.window
            of_size = todo.setdefault(size, [[] for _ in range(devices)])
            of_size[device] += [(v, window) for window in _windows(views[v], slot, config)]
    share = -(-config.eval.batch_size // devices)
    batches = [batch for size, by_device in todo.items() for batch in _batches_of_size(size, by_device, share)]
    last = {v: i for i, batch in enumerate(batches) for v, _ in batch.parts}
    return [batch._replace(finished=[v for v in last if last[v] == i]) for i, batch in enumerate(batches)]


def _windows(view: View, slot: int, config: ConfigDict) -> list[Window]:
    rows, columns, mirrored = view
    protocol = PROTOCOLS[config.eval.protocol]
    vertical, horizontal = inward_taps(rows, False, protocol), inward_taps(columns, mirrored, protocol)
    rows_first = np.array(rows.scaled / rows.source <= columns.scaled / columns.source)
    larger = rows.scaled > rows.window or columns.scaled > columns.window
    padding = protocol.padding(np.array(config.normalize.mean), larger).astype(np.float32)
    return [
        Window(
            np.array([slot, y, x], np.int32),
            Taps(*(part[y : y + rows.window] for part in vertical)),
            Taps(*(part[x : x + columns.window] for part in horizontal)),
            rows_first,
            padding,
        )
        for y in rows.starts
        for x in columns.starts
    ]


def _batches_of_size(size: tuple[int, int], todo: list[list[tuple[int, Window]]], share: int) -> list[Batch]:
    """Shares out (view, window), by device, in batches of at most `share` a device, all with the same number."""
    longest = max(map(len, todo))
    n = min(share, power_of_two(longest))
    blank = Window(
        np.zeros(3, np.int32), Taps(*np.zeros((2, 0, 0))), Taps(*np.zeros((2, 0, 0))), np.array(False), np.zeros(3, np.float32)
    )
    batches = []
    for start in range(0, longest, n):
        shares = [list(zip(*entries[start : start + n], strict=True)) or [(), ()] for entries in todo]
        windows = [window for _, share in shares for window in (*share, *[blank] * (n - len(share)))]
        place, rows, columns, rows_first, padding = zip(*windows, strict=True)
        stacked = Window(
            np.stack(place),
            _stack(rows, len(rows), size[0]),
            _stack(columns, len(columns), size[1]),
            np.stack(rows_first),
            np.stack(padding),
        )
        views = sorted({v for views, _ in shares for v in views})
        bounds = [[[sum(u < v for u in views), sum(u <= v for u in views)] for views, _ in shares] for v in views]
        batches.append(Batch(stacked, list(zip(views, np.array(bounds, np.int32), strict=True)), []))
    return batches


def _stack(taps: Sequence[Taps], count: int, size: int) -> Taps:
    """Stacks [n, T] of any n and T, with taps of weight 0 after them, to [count, size, T]; T becomes a power of two."""
    shape = (count, size, power_of_two(max(t.pixel.shape[1] for t in taps)))
    stacked = Taps(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    for i, one in enumerate(taps):
        for target, source in zip(stacked, one, strict=True):
            target[i, : source.shape[0], : source.shape[1]] = source
    return stacked


def _bounds(shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    return bucket(max(shape[0] for shape in shapes), max(shape[1] for shape in shapes))


def bucket(height: int, width: int) -> tuple[int, int]:
    """Rounds a size up, so that many sizes share few compiled shapes.

    The long side becomes one of four lengths an octave; then each side that length, 3/4 or 1/2 of it, and a multiple of STRIP.
    """
    longer = max(height, width)
    step = max(STRIP, power_of_two(longer) // 8)
    long = -(-longer // step) * step
    quarters = (max(2, -(-4 * side // long)) for side in (height, width))
    height, width = (-(-part * long // (4 * STRIP)) * STRIP for part in quarters)
    return height, width


def power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
