"""Memory that inference needs at least: said before anything compiles, and explained where it runs out all the same."""

import contextlib
import functools
import math
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import psutil
from ml_collections import ConfigDict

from pspnet_jax.errors import UserError
from pspnet_jax.infer.plan import ceil_div
from pspnet_jax.infer.protocols import Protocol

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of versions 2 and 1


def check(height: int, width: int, protocol: Protocol, num_classes: int, devices: Sequence[jax.Device]) -> None:
    """Refuses an image that cannot be predicted with the memory there is, or whose scaled size is no number.

    Raises:
      UserError: names the size, the settings, what they need and what there is.
    """
    host, device = estimate(height, width, protocol, num_classes, len(devices))
    limit = _device_limit(devices[0])
    if limit is None:  # its memory is the host's
        host, device, limit = host + len(devices) * device, 0, 0
    for needed, available, where in ((host, host_limit(), "this machine"), (device, limit, "a device")):
        if needed > available:
            raise UserError(
                f"an image of {width}x{height} needs {needed / 2**30:,.1f} GiB of memory or more for windows and scores, but "
                f"{where} has {available / 2**30:,.1f} GiB; {_advice(protocol.settings)}"
            )


def estimate(height: int, width: int, protocol: Protocol, num_classes: int, devices: int) -> tuple[int, int]:
    """Returns the least number of bytes on the host, and on each device, beside the network's own features."""
    settings, canvases, windows = protocol.settings, [], []
    for scale in settings.scales:
        try:
            scaled = protocol.scaled_size(height, width, scale)
        except (OverflowError, ValueError) as error:
            raise UserError(
                f"eval.scales={settings.scales}: an image of {width}x{height} has no such scale ({error})"
            ) from error
        crop = scaled if settings.inference == "whole" else settings.crop
        window = [protocol.window(side, size)[0] for side, size in zip(crop, scaled, strict=True)]
        windows.append(math.prod(window))
        canvases.append(math.prod(map(max, window, scaled)))
    batch = ceil_div(settings.batch_size, devices) * max(windows)
    passes = 2 if settings.flip and not protocol.flips_views else 1
    scores = min(sum(canvases), height * width + max(canvases))
    floats = 3 * (max(canvases) + devices * batch), batch * passes * (3 + num_classes) + num_classes * scores
    return 4 * floats[0], 4 * floats[1]


@contextlib.contextmanager
def explained(images: Sequence[np.ndarray], settings: ConfigDict) -> Iterator[None]:
    """Turns a failure for want of memory, while images are predicted, into a UserError that names them and what to lower."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = ", ".join(dict.fromkeys(f"{image.shape[1]}x{image.shape[0]}" for image in images))
        reason = str(error).split("\n")[0]
        raise UserError(f"memory ran out with {len(images)} image(s) of {sizes} ({reason}); {_advice(settings)}") from error


@functools.cache
def host_limit() -> int:
    """Bytes of memory that this machine, or this container, has."""
    limits = [path.read_text().strip() for path in map(pathlib.Path, CGROUP_LIMITS) if path.exists()]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])


@functools.cache
def _device_limit(device: jax.Device) -> int | None:
    """Bytes of a device's own memory; None where it shares the host's, or does not say."""
    return (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None


def _advice(settings: ConfigDict) -> str:
    whole = settings.inference == "whole"
    fields = ("batch_size", "scales", "base_size") if whole else ("batch_size", "scales", "base_size", "crop")
    values = ", ".join(f"eval.{field}={settings[field]}" for field in fields)
    return f"lower one of {values}" + (", or take eval.inference=windows" if whole else "")
