"""Detects a diverging run."""

import logging

import jax
import numpy as np

from pspnet_jax.errors import DivergedError
from pspnet_jax.train.checkpoint import Checkpoints
from pspnet_jax.train.step import Metrics

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Stops a run whose loss or gradient is not finite. Each step is checked one step later, so that the devices never wait.

    The gradient is checked too: if only the gradient is not finite, the step still destroys the weights.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._pending: tuple[int, Metrics] | None = None
        self._warned = False

    def record(self, step: int, metrics: Metrics) -> None:
        """Records the metrics of a step, and checks those of the step before it."""
        self.finish()
        self._pending = step, metrics

    def finish(self) -> None:
        """Checks the last step recorded. Raises DivergedError, which names the step and the newest checkpoint."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss, norm = (float(jax.device_get(metrics[name]).compute()) for name in ("loss", "gradient_norm"))
        if not np.isfinite(loss + norm):
            steps = self._checkpoints.steps
            newest = "no checkpoint was saved before"
            if steps:
                newest = f"the newest checkpoint is step {steps[-1]}; if it fails again from there, go back to an earlier one"
            raise DivergedError(
                f"the loss is {loss} and its gradient norm {norm} at step {step}; {newest}; try a lower "
                "optimizer.learning_rate, more optimizer.warmup_steps, or optimizer.clip_norm; if you "
                "supply the batches, check that all labels are 0 to K-1 (for K classes) or 255 (ignored)"
            )
        if norm == 0 and not self._warned:
            self._warned = True
            logger.warning(
                f"the gradient of step {step} is 0, so nothing is learned: all pixels of the batch are ignored or have weight "
                "0, or the loss does not depend on the parameters"
            )
