"""Segmentation metrics, all computed from one confusion matrix, whose counts can be summed over batches."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Metric

from pspnet_jax.models import CoarseLogits, by_rows


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Fractions from 0 to 1; NaN where the denominator is 0. The first four are means over the classes that have a value."""

    mean_iou: float
    mean_accuracy: float
    mean_precision: float
    mean_f1: float
    pixel_accuracy: float  # share of the labeled pixels that are correct
    iou: np.ndarray  # float64[K], intersection / union of each class; NaN if it is neither in the truth nor predicted
    accuracy: np.ndarray  # float64[K], share of the pixels of each class that are correct, its recall; NaN if not in the truth
    precision: np.ndarray  # float64[K], share of the pixels predicted as each class that are correct; NaN if not predicted
    f1: np.ndarray  # float64[K], harmonic mean of precision and recall, the Dice coefficient; NaN where `iou` is


def confusion_matrix(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Counts the pixels of labels [...] and predictions [...] by truth (row) and prediction (column): int32[K, K].

    Predictions are 0 to K-1. Pixels whose label is K (num_classes) or more, such as 255, are ignored. In a sharded batch, each
    device counts its own pixels, and only the matrices are summed. Exact up to 2^31 - 1 pixels: sum several batches on the
    host, in int64.
    """
    count = functools.partial(_count_by_products, num_classes=num_classes)
    bincount = functools.partial(_count_by_bincount, num_classes=num_classes)
    return jax.lax.platform_dependent(labels.astype(jnp.int32), predictions.astype(jnp.int32), cpu=bincount, default=count)


def _count_by_bincount(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    cells = num_classes * num_classes
    index = jnp.where(labels < num_classes, labels * num_classes + predictions, cells)
    return jnp.bincount(index.ravel(), length=cells + 1)[:cells].reshape(num_classes, num_classes)


def _count_by_products(labels: jax.Array, predictions: jax.Array, num_classes: int) -> jax.Array:
    """Multiplies one-hot vectors, because TPUs and GPUs count by adding up pixels one after the other.

    Exact: 0 and 1 are exact in bfloat16, and each block of rows has fewer than 2^24 pixels, which float32 can count.
    """
    labels, predictions = (x.reshape(x.shape[0] if x.ndim > 1 else 1, -1) for x in (labels, predictions))
    size = min(BLOCK // len(labels) or 1, labels.shape[1])
    missing = -labels.shape[1] % size
    labels = jnp.pad(labels, ((0, 0), (0, missing)), constant_values=num_classes)
    predictions = jnp.pad(predictions, ((0, 0), (0, missing)))

    def add_block(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        truth, predicted = (jax.nn.one_hot(x, num_classes, dtype=jnp.bfloat16) for x in block)
        counts = jnp.einsum("npk,npl->kl", truth, predicted, preferred_element_type=jnp.float32)
        return total + counts.astype(jnp.int32), None

    truth, predicted = (jnp.moveaxis(x.reshape(len(x), -1, size), 1, 0) for x in (labels, predictions))
    return jax.lax.scan(add_block, jnp.zeros((num_classes, num_classes), jnp.int32), (truth, predicted))[0]


BLOCK = 2**16  # pixels whose one-hot vectors are built at a time


def summarize(matrix: np.ndarray | jax.Array) -> Metrics:
    """Computes the metrics of a confusion matrix [K, K] (rows truth, columns prediction)."""
    counts = np.asarray(matrix, np.float64)
    correct, truth, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    wholes = truth + predicted - correct, truth, predicted, (truth + predicted) / 2
    iou, accuracy, precision, f1 = (ratio(correct, whole) for whole in wholes)
    means = _mean(iou), _mean(accuracy), _mean(precision), _mean(f1)
    return Metrics(*means, float(ratio(correct.sum(), counts.sum())), iou, accuracy, precision, f1)


@flax.struct.dataclass
class MeanIoU(Metric):
    """Mean IoU of the training batches that were counted, for `fit`; 0 if no pixel was labeled."""

    matrix: jax.Array  # f32[K, K], a confusion matrix; counts above 2^24 per cell are rounded

    @classmethod
    def from_logits(cls, logits: jax.Array | CoarseLogits, labels: jax.Array, counted: jax.Array | bool = True) -> "MeanIoU":
        """Counts the predictions of logits f32[N, H, W, K] against labels uint8[N, H, W], if `counted`, a bool[]."""
        num_classes = (logits.scores if isinstance(logits, CoarseLogits) else logits).shape[-1]

        def count() -> jax.Array:
            predictions = by_rows(lambda rows, _: jnp.argmax(rows, -1), logits, labels)
            return confusion_matrix(labels, predictions, num_classes).astype(jnp.float32)

        return cls(jax.lax.cond(counted, count, lambda: jnp.zeros((num_classes, num_classes))))

    def merge(self, other: "MeanIoU") -> "MeanIoU":
        return MeanIoU(self.matrix + other.matrix)

    def compute(self) -> float:
        return float(np.nan_to_num(summarize(self.matrix).mean_iou))


def ratio(part: np.ndarray | np.number, whole: np.ndarray | np.number) -> np.ndarray:
    """Returns the quotient of floats, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
