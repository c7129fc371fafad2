"""Fits inference into memory: chooses eval.batch_size, refuses images that are too large, and explains out-of-memory errors."""

import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import psutil
from ml_collections import ConfigDict

from pspnet_jax.errors import UserError
from pspnet_jax.infer.plan import bucket, canvas_size, ceil_div, power_of_two
from pspnet_jax.infer.protocols import Protocol

# Of a device's memory, windows in the network may take half, and scores of images a quarter. The rest is for the weights (in
# training, also the state of the optimizer) and for memory that cannot be used because it is fragmented.
FOR_WINDOWS, FOR_SCORES = 1 / 2, 1 / 4
# Maximum number of pixels in a device's forward pass: eight windows of 473x473. The convolutions of the network's last stages
# then have 28,800 rows, several hundred tiles of a matrix unit or multiprocessor each, so that more rows cannot be computed
# much faster per row, but more slots stay empty at the end of a group of images. Not yet measured on a GPU or TPU.
MAX_PIXELS = 2**21
WINDOWS = 4  # if a device does not report its memory; on CPUs, larger batches are not faster, and all devices share the cores
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroup v2, v1


def choose_batch_size(window: tuple[int, int], devices: Sequence[jax.Device], bytes_per_pixel: Callable[[], float]) -> int:
    """Returns the number of windows per forward pass over all devices, to use if eval.batch_size is 0.

    Args:
      window: height and width.
      devices: those that share the windows.
      bytes_per_pixel: measures the memory that a device needs per pixel of a window; called only if it is needed.
    """
    limit = _device_limit(devices[0])
    if limit is None:
        return WINDOWS * (1 if devices[0].platform == "cpu" else len(devices))
    return len(devices) * fitting_windows(window, limit, bytes_per_pixel())


def fitting_windows(window: tuple[int, int], limit: float, bytes_per_pixel: float) -> int:
    """Returns the number of windows to pass through the network at once on a device with `limit` bytes of memory."""
    pixels = min(MAX_PIXELS, FOR_WINDOWS * limit / bytes_per_pixel)
    return power_of_two(max(1, int(pixels / math.prod(window))) + 1) // 2


def room_for_images(height: int, width: int, protocol: Protocol, num_classes: int, devices: Sequence[jax.Device]) -> int:
    """Returns for how many images of a size a device can hold the scores: a power of two, at least 1."""
    limit = _device_limit(devices[0]) or host_limit() // len(devices)
    fitting = int(FOR_SCORES * limit / (4 * num_classes * _areas(height, width, protocol)[2]))
    return power_of_two(max(1, fitting) + 1) // 2


def check(height: int, width: int, protocol: Protocol, num_classes: int, devices: Sequence[jax.Device]) -> None:
    """Refuses an image that needs more memory than there is, or whose scaled size is not finite.

    Raises:
      UserError: names the image's size, the settings, and the memory that is needed and available.
    """
    host, device = estimate(height, width, protocol, num_classes, len(devices))
    limit = _device_limit(devices[0])
    if limit is None:  # the devices use the host's memory
        host, device, limit = host + len(devices) * device, 0, 0
    for needed, available, where in ((host, host_limit(), "this machine"), (device, limit, "a device")):
        if needed > available:
            raise UserError(
                f"an image of {width}x{height} needs at least {needed / 2**30:,.1f} GiB of memory for windows and scores, but "
                f"{where} has {available / 2**30:,.1f} GiB; {_advice(protocol.settings, protocol.settings.batch_size)}"
            )


def estimate(height: int, width: int, protocol: Protocol, num_classes: int, devices: int) -> tuple[int, int]:
    """Returns the minimum number of bytes on the host and on each device, not counting the network's activations."""
    settings, (window, canvas, scores) = protocol.settings, _areas(height, width, protocol)
    batch = max(1, ceil_div(settings.batch_size, devices)) * window
    channels = len(protocol.mean)
    floats = channels * (canvas + devices * batch), batch * protocol.passes * (channels + num_classes) + num_classes * scores
    return 4 * floats[0], 4 * floats[1]


def _areas(height: int, width: int, protocol: Protocol) -> tuple[int, int, int]:
    """Returns numbers of pixels: of the largest window, of the largest canvas, and of all arrays of scores of an image."""
    settings, canvases, windows = protocol.settings, [], []
    for scale in settings.scales:
        try:
            scaled = protocol.scaled_size(height, width, scale)
        except (OverflowError, ValueError) as error:
            raise UserError(
                f"eval.scales={settings.scales}: an image of {width}x{height} cannot be scaled by {scale} ({error})"
            ) from error
        crop = scaled if settings.inference == "whole" else settings.crop
        window = [protocol.window(side, size)[0] for side, size in zip(crop, scaled, strict=True)]
        windows.append(math.prod(window))
        canvases.append(tuple(map(max, window, scaled)))
    arrays = [math.prod(canvas_size(*canvas)) for canvas in canvases] * (2 if settings.flip and protocol.flips_views else 1)
    scores = min(sum(arrays), math.prod(bucket(height, width)) + max(arrays))
    return max(windows), max(map(math.prod, canvases)), scores


@contextlib.contextmanager
def explain_out_of_memory(images: Sequence[np.ndarray], settings: ConfigDict, batch_size: int) -> Iterator[None]:
    """Turns an out-of-memory error into a UserError that names the images' sizes and the settings to lower.

    Args:
      images: those that were computed.
      settings: config.eval.
      batch_size: the value that was used for eval.batch_size; 0 if it is not known.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = ", ".join(dict.fromkeys(f"{image.shape[1]}x{image.shape[0]}" for image in images))
        reason = str(error).split("\n")[0]
        raise UserError(
            f"memory ran out with {len(images)} image(s) of {sizes} ({reason}); {_advice(settings, batch_size)}"
        ) from error


@functools.cache
def host_limit() -> int:
    """Returns the memory of this machine or container, in bytes."""
    limits = [path.read_text().strip() for path in map(pathlib.Path, CGROUP_LIMITS) if path.exists()]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])


@functools.cache
def _device_limit(device: jax.Device) -> int | None:
    """Returns the size of a device's own memory in bytes; None if it uses the host's memory or does not report the size."""
    return (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None


def _advice(settings: ConfigDict, batch_size: int) -> str:
    whole = settings.inference == "whole"
    values = [f"eval.{field}={settings[field]}" for field in ("scales", "base_size", *([] if whole else ["crop"]))]
    if batch_size:
        values.insert(0, f"eval.batch_size={batch_size}" + ("" if settings.batch_size else " (chosen because it is 0)"))
    return f"lower one of {', '.join(values)}" + (", or use eval.inference=windows" if whole else "")
