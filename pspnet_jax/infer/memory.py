"""Checks before compilation whether inference can fit into memory, and explains the error if memory runs out anyway."""

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

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroup v2, v1


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
                f"{where} has {available / 2**30:,.1f} GiB; {_advice(protocol.settings)}"
            )


def estimate(height: int, width: int, protocol: Protocol, num_classes: int, devices: int) -> tuple[int, int]:
    """Returns the minimum number of bytes on the host and on each device, not counting the network's activations."""
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
        canvases.append(math.prod(map(max, window, scaled)))
    batch = ceil_div(settings.batch_size, devices) * max(windows)
    passes = 2 if settings.flip and not protocol.flips_views else 1
    scores = min(sum(canvases), height * width + max(canvases))
    floats = 3 * (max(canvases) + devices * batch), batch * passes * (3 + num_classes) + num_classes * scores
    return 4 * floats[0], 4 * floats[1]


@contextlib.contextmanager
def explain_out_of_memory(images: Sequence[np.ndarray], settings: ConfigDict) -> Iterator[None]:
    """Turns an out-of-memory error into a UserError that names the images' sizes and the settings to lower."""
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
    """Returns the memory of this machine or container, in bytes."""
    limits = [path.read_text().strip() for path in map(pathlib.Path, CGROUP_LIMITS) if path.exists()]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])


@functools.cache
def _device_limit(device: jax.Device) -> int | None:
    """Returns the size of a device's own memory in bytes; None if it uses the host's memory or does not report the size."""
    return (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None


def _advice(settings: ConfigDict) -> str:
    whole = settings.inference == "whole"
    fields = ("batch_size", "scales", "base_size") if whole else ("batch_size", "scales", "base_size", "crop")
    values = ", ".join(f"eval.{field}={settings[field]}" for field in fields)
    return f"lower one of {values}" + (", or use eval.inference=windows" if whole else "")
