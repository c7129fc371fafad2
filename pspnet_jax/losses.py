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
from pspnet_jax.models import CoarseLogits, by_rows

Batch = dict[str, jax.Array]
Logits = jax.Array | CoarseLogits  # f32[N, H, W, K], upsampled or not


class Term(NamedTuple):
    """A weighted mean, stored as a sum f32[] and a weight f32[]; if the weight is 0, so is the mean."""

    sum: jax.Array
    weight: jax.Array
    scale: jax.Array | float = 1.0

    def mean(self, weight: jax.Array) -> jax.Array:
        """Returns the sum divided by the whole batch's `weight`, without the scale."""
        return self.sum / jnp.where(weight > 0, weight, 1)


Loss = Callable[[Any, Batch, jax.Array], tuple[dict[str, Term], dict[str, Metric]]]


def build(config: ConfigDict) -> Loss:
    """Builds the loss of `config.loss`, for models that return (logits, auxiliary logits or None) and batches with a "label".

    The logits may be arrays or `models.CoarseLogits`. The terms are named after their kinds, such as "cross_entropy" and
    "auxiliary_cross_entropy". The metric "mean_iou" counts the batches of the steps that are logged, by `config.every.log`.

    Raises:
      UserError: lists every field of `config.loss` with an invalid value.
    """
    loss = config.loss
    if wrong := problems(loss):
        raise UserError("\n".join(wrong))
    kinds = loss.terms.split("+")
    auxiliary_scale = SCHEDULES[loss.auxiliary_schedule](loss.auxiliary_weight, config.total_steps)

    def compute(outputs: Any, batch: Batch, step: jax.Array) -> tuple[dict[str, Term], dict[str, Metric]]:
        logits, auxiliary = outputs
        labels = batch["label"]
        terms = {kind: Term(*LOSSES[kind](logits, labels, loss)) for kind in kinds}
        if auxiliary is not None:
            scale = auxiliary_scale(step)
            terms |= {f"auxiliary_{kind}": Term(*LOSSES[kind](auxiliary, labels, loss), scale) for kind in kinds}
        logged = step + 1 == config.total_steps
        if config.every.log:
            logged |= (step + 1) % config.every.log == 0
        return terms, {"mean_iou": MeanIoU.from_logits(logits, labels, logged)}

    return compute


def problems(loss: ConfigDict) -> list[str]:
    """Returns one message for each field of `config.loss` with an invalid value."""
    found = []
    if unknown := [kind for kind in loss.terms.split("+") if kind not in LOSSES]:
        choices = f"one of {', '.join(LOSSES)}, or several in the form 'cross_entropy+dice'"
        found.append(f"loss.terms={loss.terms!r}: {unknown[0]!r} is unknown; expected {choices}")
    elif len(set(kinds := loss.terms.split("+"))) < len(kinds):
        found.append(f"loss.terms={loss.terms!r}: expected each term once")
    if min(loss.class_weights, default=1) < 0 or max(loss.class_weights, default=1) == 0:
        found.append(f"loss.class_weights={loss.class_weights}: expected weights of 0 or more, not all 0")
    return found


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {  # for the weight of the auxiliary loss
    "constant": lambda weight, total_steps: optax.constant_schedule(weight),
    "linear": lambda weight, total_steps: optax.linear_schedule(weight, 0.0, total_steps),
}


def pixel_cross_entropy(logits: Logits, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each pixel, 0 where the label is 255: f32[N, H, W, K], uint8[N, H, W] -> f32[N, H, W].

    `smoothing` is the share of each target that is distributed over all K classes (Szegedy et al. 2016, section 7).
    """

    def of_rows(logits: jax.Array, labels: jax.Array) -> jax.Array:
        labels = labels[..., None].astype(jnp.int32)
        classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        # Not indexing but a sum over the classes, whose gradient is no scatter. It is NaN for labels that are no class.
        scores = jnp.sum(jnp.where(labels == classes, logits, 0), -1)
        scores = jnp.where((labels[..., 0] >= 0) & (labels[..., 0] < logits.shape[-1]), scores, jnp.nan)
        if smoothing:
            scores = (1 - smoothing) * scores + smoothing * jnp.mean(logits, -1)
        return jnp.where(labels[..., 0] != IGNORE, jax.nn.logsumexp(logits, -1) - scores, 0)

    return by_rows(of_rows, logits, labels)


def pixel_weights(labels: jax.Array, class_weights: tuple[float, ...]) -> jax.Array:
    """Weight of each pixel, f32[N, H, W]: that of its class (1 without class weights), or 0 where the label is 255."""
    if not class_weights:
        return (labels != IGNORE).astype(jnp.float32)
    is_class = labels[..., None].astype(jnp.int32) == jnp.arange(len(class_weights))
    return jnp.sum(jnp.where(is_class, jnp.asarray(class_weights, jnp.float32), 0), -1)


def cross_entropy(logits: Logits, labels: jax.Array, loss: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Softmax cross-entropy with `loss.class_weights` and `loss.label_smoothing`: sum over the pixels, sum of their weights."""
    weights = pixel_weights(labels, loss.class_weights)
    pixels = pixel_cross_entropy(logits, labels, loss.label_smoothing)
    return jnp.sum(pixels * weights if loss.class_weights else pixels), jnp.sum(weights)


def ohem(logits: Logits, labels: jax.Array, loss: ConfigDict) -> tuple[jax.Array, jax.Array]:
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


def focal(logits: Logits, labels: jax.Array, loss: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Focal loss (Lin et al. 2017): cross-entropy times (1 - p)^`loss.focal_gamma`; p is the probability of the true class."""
    weights = pixel_weights(labels, loss.class_weights)
    pixels = pixel_cross_entropy(logits, labels)
    wrong = jnp.maximum(-jnp.expm1(-pixels), 1e-7)  # 1 - p, kept above 0, where a power may have no gradient
    return jnp.sum(weights * wrong**loss.focal_gamma * pixels), jnp.sum(weights)


def dice(logits: Logits, labels: jax.Array, loss: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Soft Dice loss (Milletari et al. 2016): 1 - the mean over an image's classes of 2 |P Y| / (|P| + |Y|).

    P are the probabilities and Y the one-hot labels of the labeled pixels. Returns the sum over the images and the number of
    images with labeled pixels.
    """

    def sums_of_rows(logits: jax.Array, labels: jax.Array) -> jax.Array:
        probabilities = jax.nn.softmax(logits) * (labels != IGNORE)[..., None]
        truth = jax.nn.one_hot(labels, logits.shape[-1])  # zeros for 255
        return jnp.stack([(probabilities * truth).sum(2), probabilities.sum(2), truth.sum(2)], 2)  # [N, R, 3, K]

    overlap, predicted, pixels = jnp.moveaxis(by_rows(sums_of_rows, logits, labels).sum(1), 1, 0)
    size, present = predicted + pixels, pixels > 0
    classes = present.sum(-1)
    scores = jnp.where(present, 2 * overlap / jnp.maximum(size, 1), 0).sum(-1) / jnp.maximum(classes, 1)
    return jnp.sum(jnp.where(classes > 0, 1 - scores, 0)), jnp.sum(classes > 0, dtype=jnp.float32)


LOSSES: dict[str, Callable[[Logits, jax.Array, ConfigDict], tuple[jax.Array, jax.Array]]] = {
    "cross_entropy": cross_entropy,
    "ohem": ohem,
    "focal": focal,
    "dice": dice,
}


def class_weights(how: str, pixels: np.ndarray, image_pixels: np.ndarray) -> tuple[float, ...]:
    """Weights of the K classes from their frequencies in the training data; 0 for a class without pixels.

    `how` is a key of WEIGHTINGS; `pixels`, int64[K], are those of each class, and `image_pixels`, int64[K], the labeled pixels
    of the images that contain it.
    """
    frequencies, middle = WEIGHTINGS[how](pixels, image_pixels)
    return tuple(float(middle(frequencies[pixels > 0]) / f) if f > 0 else 0.0 for f in frequencies)


WEIGHTINGS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, Callable]]] = {
    "inverse": lambda pixels, image_pixels: (pixels, np.mean),
    # Eigen and Fergus 2015, section 6.1
    "median": lambda pixels, image_pixels: (pixels / np.maximum(image_pixels, 1), np.median),
}
