"""Segmentation metrics, all computed from one confusion matrix, whose counts can be summed over batches."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Metric


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Fractions from 0 to 1; NaN where the denominator is 0.

    Attributes:
      mean_iou: mean of `iou` over the classes present in truth or prediction.
      mean_accuracy: mean of `accuracy` over the classes present in the truth.
      pixel_accuracy: share of the labeled pixels that are correct.
      iou: float64[K], intersection / union of each class.
      accuracy: float64[K], share of the pixels of each class that are correct.
    """

    mean_iou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: np.ndarray
    accuracy: np.ndarray


def confusion_matrix(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Counts pixels by truth (row) and prediction (column).

    Pixels whose label is num_classes or more, such as 255, are ignored. In a sharded batch, each device counts its own
    pixels, and only the matrices are summed. Exact up to 2^31 - 1 pixels: sum several batches on the host, in int64.

    Args:
      labels: unsigned or non-negative integers [...].
      predictions: integers 0..K-1, of the same shape.
      num_classes: K.

    Returns:
      int32[K, K].
    """
    labels, predictions = labels.astype(jnp.int32), predictions.astype(jnp.int32)
    cells = num_classes * num_classes
    index = jnp.where(labels < num_classes, labels * num_classes + predictions, cells)
    return jnp.bincount(index.ravel(), length=cells + 1)[:cells].reshape(num_classes, num_classes)


def summarize(matrix: np.ndarray | jax.Array) -> Metrics:
    """Computes the metrics of a confusion matrix [K, K] (rows truth, columns prediction)."""
    counts = np.asarray(matrix, np.float64)
    correct, truth, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    iou = _ratio(correct, truth + predicted - correct)
    accuracy = _ratio(correct, truth)
    return Metrics(_mean(iou), _mean(accuracy), float(_ratio(correct.sum(), counts.sum())), iou, accuracy)


@flax.struct.dataclass
class MeanIoU(Metric):
    """Mean IoU of the training batches since the last log line, for `fit`; 0 if no pixel was labeled.

    Attributes:
      matrix: f32[K, K], a confusion matrix; counts above 2^24 per cell are rounded.
    """

    matrix: jax.Array

    @classmethod
    def from_logits(cls, logits: jax.Array, labels: jax.Array) -> "MeanIoU":
        """Counts the predictions of logits f32[N, H, W, K] against labels uint8[N, H, W]."""
        counts = confusion_matrix(labels, jnp.argmax(logits, -1), logits.shape[-1])
        return cls(counts.astype(jnp.float32))

    def merge(self, other: "MeanIoU") -> "MeanIoU":
        return MeanIoU(self.matrix + other.matrix)

    def compute(self) -> float:
        return float(np.nan_to_num(summarize(self.matrix).mean_iou))


def _ratio(part: np.ndarray | np.number, whole: np.ndarray | np.number) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
