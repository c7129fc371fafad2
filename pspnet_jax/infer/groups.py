"""Groups of images that go through the network together: they fill its batches and keep all devices busy."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pspnet_jax.infer.plan import MaxWindows, WindowCounts, ceil_div, divide, power_of_two, schedule

AHEAD = 8  # least number of examples per device from which a group is chosen, with several devices
GOOD = 0.95  # share of slots in use for which a group is large enough; a larger one must use 1 / GOOD times the share

Example = dict[str, Any]  # image [H, W, C] and any other fields of its source


def form_groups(
    examples: Iterable[Example],
    windows: Callable[[Example], WindowCounts],
    room: Callable[[Example], int],
    max_windows: MaxWindows,
    devices: int,
) -> Iterator[list[Example]]:
    """Yields the examples in groups.

    One device gets consecutive examples with the same window sizes. With several, a group consists of the oldest example that
    is waiting and of those with the most similar numbers of windows of each size, so that no device has much less to do than
    another; only a few examples per device wait. A group is large enough to fill a forward pass, and up to four times as large
    if more of its slots are used then. Up to `devices` - 1 of its examples are left for a later group for the same reason.

    Args:
      examples: read only as far as necessary.
      windows: counts an example's windows.
      room: maximum number of images of an example's size per device, a power of two.
      max_windows: see `plan.schedule`.
      devices: number of devices.
    """
    source = ((example, windows(example)) for example in examples)
    waiting = list(itertools.islice(source, 1))
    while waiting:
        oldest, counts = waiting[0]
        full = min(power_of_two(ceil_div(max_windows(size), count)) for size, count in counts.items())
        group, used = [waiting[0]], 0.0
        for per_device in (min(full, room(oldest)), 2 * full, 4 * full):
            if per_device > room(oldest) or used >= GOOD:
                break
            ahead = devices * (max(per_device, AHEAD) if devices > 1 else per_device)
            waiting += itertools.islice(source, max(0, ahead - len(waiting)))
            alike = list(itertools.islice(_alike(waiting, devices), devices * per_device))
            larger = [alike[: len(alike) - left] for left in range(min(devices, len(alike)))]
            shares = [_used(candidate, max_windows, devices) for candidate in larger]
            if max(shares) * GOOD > used:
                used, group = max(shares), larger[shares.index(max(shares))]
        yield [example for example, _ in group]
        chosen = set(map(id, group))
        waiting = [item for item in waiting if id(item) not in chosen] or list(itertools.islice(source, 1))


def _alike(waiting: Sequence[tuple[Example, WindowCounts]], devices: int) -> Iterable[tuple[Example, WindowCounts]]:
    """Returns the examples that may share a group with the first, the most similar first."""
    first = waiting[0][1]
    if devices == 1:
        return itertools.takewhile(lambda item: item[1].keys() == first.keys(), waiting)
    sharing = (item for item in waiting if item[1].keys() & first.keys())
    return sorted(sharing, key=lambda item: sum(abs(item[1][size] - first[size]) for size in item[1].keys() | first.keys()))


def _used(group: Sequence[tuple[Example, WindowCounts]], max_windows: MaxWindows, devices: int) -> float:
    """Returns the share of slots that hold a window."""
    windows = [counts for _, counts in group]
    slots = sum(devices * n * passes for _, n, passes in schedule(windows, divide(windows, devices), max_windows))
    return sum(counts.total() for counts in windows) / slots
