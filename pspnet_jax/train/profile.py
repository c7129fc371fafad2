"""Traces of training steps by JAX's profiler."""

import contextlib
import itertools
import logging
from collections.abc import Callable

import jax
from etils import epath

logger = logging.getLogger(__name__)


def hook(folder: epath.Path, first: int, count: int) -> Callable[[int], None]:
    """Returns a hook, called after each step, that traces `count` steps into the folder, beginning with step `first`.

    The devices may still be busy with a step when its hook is called, so the trace begins and ends after they have finished.
    If training begins too late, as in a run that is resumed, nothing is traced, and a warning says so.
    """
    from clu import periodic_actions  # imports TensorFlow

    profile = periodic_actions.Profile(
        logdir=folder, first_profile=first - 1, num_profile_steps=count, profile_duration_ms=None, every_secs=None
    )
    calls = itertools.count()

    def after(step: int) -> None:
        if next(calls) == 0 and step >= first:
            logger.warning(f"--profile: nothing is traced, because training began at step {step}; choose a step after it")
        if step in (first - 1, first + count - 1):
            for array in jax.live_arrays():
                with contextlib.suppress(RuntimeError):  # some may be donated already; others' errors come up in the next step
                    array.block_until_ready()
        profile(step)

    return after
