"""A run that diverges stops at once."""

import logging

import jax
import numpy as np

from pspnet_jax.errors import DivergedError
from pspnet_jax.train.checkpoint import Checkpoints
from pspnet_jax.train.step import Metrics

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Stops a run whose loss or gradient is not finite, looking one step late so that the device never waits for it.

    A loss may be finite where its gradient is not, and the state after that step is lost.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._pending: tuple[int, Metrics] | None = None
        self._warned = False

    def see(self, step: int, metrics: Metrics) -> None:
        """Takes note of a step, and waits for the one before it."""
        self.finish()
        self._pending = step, metrics

    def finish(self) -> None:
        """Waits for the last step seen.

        Raises:
          DivergedError: names the step and the last good checkpoint.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        loss, norm = (float(jax.device_get(metrics[name]).compute()) for name in ("loss", "gradient_norm"))
        if not np.isfinite(loss + norm):
            steps = self._checkpoints.steps
            good = "no checkpoint was saved before"
            if steps:
                good = f"the newest checkpoint is that of step {steps[-1]}; where it ends here again, go back to an earlier one"
            raise DivergedError(
                f"the loss is {loss}, its gradient's norm {norm} at step {step}; {good}; try a lower optimizer.learning_rate, "
                "optimizer.warmup_steps or optimizer.clip_norm; where the batches are your own, check their labels, too: any "
                "but 0 to K-1 (of K classes) and 255 (ignored) does this"
            )
        if norm == 0 and not self._warned:
            self._warned = True
            logger.warning(
                f"the gradient of step {step} is 0: nothing is learned from a batch whose pixels are all ignored or of "
                "weight 0, or if the loss does not depend on the parameters"
            )
