"""Segmentation losses over labeled pixels, and the interface of a loss for `fit`.

A loss is a function (outputs, batch, step) -> (terms, metrics), where `outputs` are the model's training outputs and `step` is
int32[]. Each term is a mean, given as a sum and a weight that can be added up over the parts of a batch. The loss is the sum of
`scale * sum / weight` over the terms, with sums and weights of the whole batch. Metrics are clu.metrics.Metric objects.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu.metrics import Metric
from ml_collections import ConfigDict

from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError
from pspnet_jax.metrics import MeanIoU

Batch = dict[str, jax.Array]


class Term(NamedTuple):
    """A weighted mean, stored as a sum f32[] and a weight f32[]; if the weight is 0, so is the mean."""

    sum: jax.Array
    weight: jax.Array
    scale: jax.Array | float = 1.0

    def mean(self, weight: jax.Array) -> jax.Array:
        """Returns the sum divided by the whole batch's `weight`, without the scale."""
        return self.sum / jnp.where(weight > 0, weight, 1)


Loss = Callable[[Any, Batch, jax.Array], tuple[dict[str, Term], dict[str, Metric]]]


def build(loss: ConfigDict, total_steps: int) -> Loss:
    """Builds the loss of `config.loss`, for models that return (logits, auxiliary logits or None) and batches with a "label".

    Its terms are named after their kinds, such as "cross_entropy" and "auxiliary_cross_entropy"; its metric is "mean_iou".

    Raises:
      UserError: lists every field with an invalid value.
    """
    if wrong := problems(loss):
        raise UserError("\n".join(wrong))
    kinds = loss.terms.split("+")
    auxiliary_scale = SCHEDULES[loss.auxiliary_schedule](loss.auxiliary_weight, total_steps)

    def compute(outputs: Any, batch: Batch, step: jax.Array) -> tuple[dict[str, Term], dict[str, Metric]]:
        logits, auxiliary = outputs
        labels = batch["label"]
        terms = {kind: Term(*LOSSES[kind](logits, labels, loss)) for kind in kinds}
        if auxiliary is not None:
            scale = auxiliary_scale(step)
            terms |= {f"auxiliary_{kind}": Term(*LOSSES[kind](auxiliary, labels, loss), scale) for kind in kinds}
        return terms, {"mean_iou": MeanIoU.from_logits(logits, labels)}

    return compute


def problems(loss: ConfigDict) -> list[str]:
    """Returns one message for each field of `config.loss` with an invalid value."""
    found = []
    if unknown := [kind for kind in loss.terms.split("+") if kind not in LOSSES]:
        choices = f"one of {', '.join(LOSSES)}, or several in the form 'cross_entropy+dice'"
        found.append(f"loss.terms={loss.terms!r}: {unknown[0]!r} is unknown; expected {choices}")
    if min(loss.class_weights, default=1) < 0 or max(loss.class_weights, default=1) == 0:
        found.append(f"loss.class_weights={loss.class_weights}: expected weights of 0 or more, not all 0")
    return found


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {  # for the weight of the auxiliary loss
    "constant": lambda weight, total_steps: optax.constant_schedule(weight),
    "linear": lambda weight, total_steps: optax.linear_schedule(weight, 0.0, total_steps),
}


def pixel_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each pixel, 0 where the label is 255: f32[N, H, W, K], uint8[N, H, W] -> f32[N, H, W].

    Args:
      logits: scores of the K classes.
      labels: 0..K-1, or 255.
      smoothing: share of each target that is distributed over all K classes (Szegedy et al. 2016, section 7).
    """
    labeled = labels != IGNORE
    targets = jnp.where(labeled, labels, 0).astype(jnp.int32)
    targets = jnp.where(targets < 0, logits.shape[-1], targets)  # negative labels give NaN, not a class from the end
    pixels = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if smoothing:
        uniform = jax.nn.logsumexp(logits, -1) - jnp.mean(logits, -1)  # cross-entropy with 1/K for each class
        pixels = (1 - smoothing) * pixels + smoothing * uniform
    return jnp.where(labeled, pixels, 0)


def pixel_weights(labels: jax.Array, class_weights: tuple[float, ...]) -> jax.Array:
    """Weight of each pixel, f32[N, H, W]: that of its class (1 without class weights), or 0 where the label is 255."""
    if not class_weights:
        return (labels != IGNORE).astype(jnp.float32)
    table = jnp.zeros(256).at[: len(class_weights)].set(jnp.asarray(class_weights))
    return table[labels]


def cross_entropy(logits: jax.Array, labels: jax.Array, loss: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Softmax cross-entropy with `loss.class_weights` and `loss.label_smoothing`: sum over the pixels, sum of their weights."""
    weights = pixel_weights(labels, loss.class_weights)
    pixels = pixel_cross_entropy(logits, labels, loss.label_smoothing)
    return jnp.sum(pixels * weights if loss.class_weights else pixels), jnp.sum(weights)


def ohem(logits: jax.Array, labels: jax.Array, loss: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Online hard example mining (Shrivastava et al. 2016): cross-entropy over only the hard pixels of each image.

    A pixel is hard if its class has a probability below `loss.ohem_threshold`, or if it is among the image's
    `loss.ohem_min_kept` pixels with the largest loss.
    """
    weights = pixel_weights(labels, loss.class_weights)
    hardness = jax.lax.stop_gradient(pixel_cross_entropy(logits, labels).reshape(len(labels), -1))
    rank = min(loss.ohem_min_kept, hardness.shape[1])
    bound = jnp.minimum(-jnp.log(loss.ohem_threshold), jnp.sort(hardness, axis=1)[:, -rank])
    kept = weights * (hardness >= bound[:, None]).reshape(labels.shape)
    return jnp.sum(kept * pixel_cross_entropy(logits, labels, loss.label_smoothing)), jnp.sum(kept)


def focal(logits: jax.Array, labels: jax.Array, loss: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Focal loss (Lin et al. 2017): cross-entropy times (1 - p)^`loss.focal_gamma`; p is the probability of the true class."""
    weights = pixel_weights(labels, loss.class_weights)
    pixels = pixel_cross_entropy(logits, labels)
    wrong = jnp.maximum(-jnp.expm1(-pixels), 1e-7)  # 1 - p, kept above 0, where a power may have no gradient
    return jnp.sum(weights * wrong**loss.focal_gamma * pixels), jnp.sum(weights)


def dice(logits: jax.Array, labels: jax.Array, loss: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Soft Dice loss (Milletari et al. 2016): 1 - the mean over an image's classes of 2 |P Y| / (|P| + |Y|).

    P are the probabilities and Y the one-hot labels of the labeled pixels. Returns the sum over the images and the number of
    images with labeled pixels.
    """
    labeled = labels != IGNORE
    probabilities = jax.nn.softmax(logits) * labeled[..., None]
    truth = jax.nn.one_hot(labels, logits.shape[-1])  # zeros for 255
    overlap, size = (x.sum((1, 2)) for x in (probabilities * truth, probabilities + truth))
    present = truth.any((1, 2))
    classes = present.sum(-1)
    scores = jnp.where(present, 2 * overlap / jnp.maximum(size, 1), 0).sum(-1) / jnp.maximum(classes, 1)
    return jnp.sum(jnp.where(classes > 0, 1 - scores, 0)), jnp.sum(classes > 0, dtype=jnp.float32)


LOSSES: dict[str, Callable[[jax.Array, jax.Array, ConfigDict], tuple[jax.Array, jax.Array]]] = {
    "cross_entropy": cross_entropy,
    "ohem": ohem,
    "focal": focal,
    "dice": dice,
}


def class_weights(how: str, pixels: np.ndarray, image_pixels: np.ndarray) -> tuple[float, ...]:
    """Weights of the K classes from their frequencies in the training data; 0 for a class without pixels.

    Args:
      how: a key of WEIGHTINGS.
      pixels: int64[K], number of pixels of each class.
      image_pixels: int64[K], number of labeled pixels in the images that contain the class.
    """
    frequencies, middle = WEIGHTINGS[how](pixels, image_pixels)
    return tuple(float(middle(frequencies[pixels > 0]) / f) if f > 0 else 0.0 for f in frequencies)


WEIGHTINGS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Callable]]] = {
    "inverse": lambda pixels, image_pixels: (pixels, np.mean),
    # Eigen and Fergus 2015, section 6.1
    "median": lambda pixels, image_pixels: (pixels / np.maximum(image_pixels, 1), np.median),
}
