"""What evaluation does to an image, as numbers: sizes, windows, resizing, and their grouping into batches.

All that an image's size decides is separable, so it travels as taps: which input rows (and columns) each output row
(column) is a weighted sum of. Inward taps resize an image and center it on a canvas, from which windows are cut; outward
taps take the network's answers, summed up over the windows on a like canvas, back to the image. So sizes are data, and only
upper bounds of the longest sides (`bucket`) are shapes that have to be compiled.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

STRIP = 32  # rows of an image that are finished at a time, K numbers a pixel


class Taps(NamedTuple):
    """Output i is the sum over t of weight[i, t] * input[pixel[i, t]]."""

    pixel: np.ndarray  # int32[..., n, T]
    weight: np.ndarray  # float32[..., n, T]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Where published evaluations differ."""

    long_side: Callable[[int, float], int]  # base, scale -> pixels
    resize: Callable[[int, int], Taps]  # pixels out, pixels in -> taps
    pad_before: Callable[[int], int]  # pixels missing to the crop -> how many of them go on top (left)
    merge: Callable[..., jax.Array]  # logits, with flip also those of the mirror image -> what is averaged over windows


class Axis(NamedTuple):
    """One axis of one image at one scale."""

    size: int  # of the canvas: the scaled image, or the window where that is larger
    window: int
    starts: list[int]  # of the windows on the canvas
    inward: Taps  # image -> canvas; the padding has weight 0, which is the mean of a normalized image
    outward: Taps  # sums over windows on the canvas -> means over windows on the image


class Run(NamedTuple):
    """Windows of one size, in network batches of n a device; a device has those of its own images, ordered by scale."""

    scales: slice
    window: tuple[int, int]
    entries: np.ndarray  # int32[batches, devices * n, 3]: image on the device, first row, first column
    bounds: np.ndarray  # int32[batches, devices, scales + 1]: scale s has the entries bounds[s] .. bounds[s + 1]


class Plan(NamedTuple):
    """All there is to do for some images; M images and the longest side S are rounded up to bounds."""

    images: np.ndarray  # uint8[M, S, S, 3]
    inward: list[tuple[Taps, Taps]]  # by scale, rows and columns: [M, side of a square canvas, T]
    outward: list[tuple[Taps, Taps]]  # by scale, rows and columns: [M, S, T]
    runs: list[Run]


def bilinear(size: int, source: int) -> Taps:
    """Resizes `source` pixels to `size`: half-pixel centers, no antialiasing, edges repeated (cv2's INTER_LINEAR)."""
    position = np.clip((np.arange(size) + 0.5) * (source / size) - 0.5, 0, source - 1)
    low = np.floor(position)
    pixel = np.stack([low, np.minimum(low + 1, source - 1)], -1)
    return Taps(pixel.astype(np.int32), np.stack([low + 1 - position, position - low], -1).astype(np.float32))


def mean_of_softmaxes(*logits: jax.Array) -> jax.Array:
    """Returns the mean of the softmaxes of [..., W, K] and, if given, of its mirror image's, turned back: float32."""
    first, *mirrored = (jax.nn.softmax(x.astype(jnp.float32)) for x in logits)
    return (first + mirrored[0][..., ::-1, :]) / 2 if mirrored else first


PROTOCOLS = {
    "semseg": Protocol(
        long_side=lambda base, scale: round(scale * base),
        resize=bilinear,
        pad_before=lambda missing: missing // 2,
        merge=mean_of_softmaxes,
    )
}


def scaled_size(height: int, width: int, base: int, scale: float, protocol: Protocol) -> tuple[int, int]:
    """Returns (height, width) at a scale; `base` is the long side at scale 1, or 0 for the image's own."""
    long = max(height, width)
    scaled = max(1, protocol.long_side(base or long, scale))
    height, width = (max(1, round(scaled / long * side)) for side in (height, width))
    return height, width


def window_starts(size: int, window: int) -> list[int]:
    """Returns each window's first pixel, for `size` >= window pixels: ceil(2/3 window) apart, the last flush with the end."""
    stride = -(-2 * window // 3)
    return [min(start, size - window) for start in range(0, size - window + stride, stride)]


def plan_axis(source: int, scaled: int, window: int, protocol: Protocol) -> Axis:
    """Plans one axis of an image of `source` pixels, resized to `scaled` ones."""
    size = max(scaled, window)
    starts = window_starts(size, window)
    before = protocol.pad_before(size - scaled)
    padding = (before, size - scaled - before)
    inward = Taps(*(np.pad(x, (padding, (0, 0))) for x in protocol.resize(scaled, source)))
    times_seen = np.zeros(size, np.float32)
    for start in starts:
        times_seen[start : start + window] += 1
    pixel, weight = protocol.resize(source, scaled)
    pixel = pixel + before
    return Axis(size, window, starts, inward, Taps(pixel, weight / times_seen[pixel]))


def plan_image(height: int, width: int, settings: ConfigDict) -> list[tuple[Axis, Axis]]:
    """Plans rows and columns at each scale of `settings`, which is config.eval."""
    protocol = PROTOCOLS[settings.protocol]
    scales = []
    for scale in settings.scales:
        scaled = scaled_size(height, width, settings.base_size, scale, protocol)
        window = scaled if settings.inference == "whole" else settings.crop
        rows = plan_axis(height, scaled[0], window[0], protocol)
        scales.append((rows, plan_axis(width, scaled[1], window[1], protocol)))
    return scales


def plan_images(images: Sequence[np.ndarray], settings: ConfigDict, devices: int) -> Plan:
    """Plans images uint8[H, W, 3] that are shared out among devices."""
    plans = [plan_image(image.shape[0], image.shape[1], settings) for image in images]
    count = devices * power_of_two(-(-len(images) // devices))
    side = bucket(max(max(image.shape) for image in images))
    batch = np.zeros((count, side, side, 3), np.uint8)
    for slot, image in zip(batch, images, strict=False):
        slot[: image.shape[0], : image.shape[1]] = image
    inward, outward = [], []
    for scale in zip(*plans, strict=True):
        both = tuple(zip(*scale, strict=True))  # rows and columns of all images
        canvas = bucket(max(axis.size for axes in both for axis in axes))
        rows, columns = (_stack([axis.inward for axis in axes], count, canvas) for axes in both)
        inward.append((rows, columns))
        rows, columns = (_stack([axis.outward for axis in axes], count, side) for axes in both)
        outward.append((rows, columns))
    share = -(-settings.batch_size // devices)
    if settings.inference == "whole":  # each scale has windows of its own size
        runs = [_run(plans, slice(s, s + 1), devices, count // devices, share) for s in range(len(inward))]
    else:
        runs = [_run(plans, slice(0, len(inward)), devices, count // devices, share)]
    return Plan(batch, inward, outward, runs)


def _run(plans: list[list[tuple[Axis, Axis]]], scales: slice, devices: int, images: int, share: int) -> Run:
    """Lists the windows of some scales, of `images` images a device, in batches of at most `share` a device."""
    todo: list[list[tuple[int, int, int, int]]] = [[] for _ in range(devices)]
    last = len(plans[0][scales])
    for scale in range(last):
        for i, plan in enumerate(plans):
            rows, columns = plan[scales][scale]
            device, slot = divmod(i, images)
            todo[device] += [(scale, slot, y, x) for y in rows.starts for x in columns.starts]
    longest = max(map(len, todo))
    n = min(share, power_of_two(longest))
    table = np.zeros((-(-longest // n) * n, devices, 4), np.int32)
    table[..., 0] = last  # what is left over comes after every scale
    for device, entries in enumerate(todo):
        table[: len(entries), device] = np.reshape(entries, (-1, 4))
    by_batch = table.reshape(-1, n, devices, 4).swapaxes(1, 2)
    bounds = (by_batch[..., :1] < np.arange(last + 1)).sum(2, dtype=np.int32)
    rows, columns = plans[0][scales][0]
    return Run(scales, (rows.window, columns.window), by_batch[..., 1:].reshape(-1, devices * n, 3), bounds)


def _stack(taps: Sequence[Taps], count: int, size: int) -> Taps:
    """Stacks [n, T] of any n and T, with taps of weight 0 after them, to [count, size, T]."""
    shape = (count, size, max(t.pixel.shape[1] for t in taps))
    stacked = Taps(np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    for i, one in enumerate(taps):
        for target, source in zip(stacked, one, strict=True):
            target[i, : source.shape[0], : source.shape[1]] = source
    return stacked


def bucket(size: int) -> int:
    """Rounds up to one of four sizes an octave, all multiples of STRIP, so that many sizes share few compiled shapes."""
    step = max(STRIP, power_of_two(size) // 8)
    return -(-size // step) * step


def power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
