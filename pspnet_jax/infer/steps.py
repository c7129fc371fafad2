"""The steps before and after the network, as programs for the share of the arrays that one device holds."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pspnet_jax import models
from pspnet_jax.datasets import IGNORE
from pspnet_jax.infer.plan import STRIP, ToImage, ceil_div
from pspnet_jax.infer.protocols import Protocol
from pspnet_jax.infer.resample import ResamplingWeights, resample

ViewSums = tuple[jax.Array, ToImage]  # sums over windows on the canvas, and the weights that resample them to the image


def prepare(statistics: ConfigDict, flip: bool, windows: jax.Array) -> list[jax.Array]:
    """Normalizes windows f32[n, h, w, C]; with `flip`, adds a second batch of flipped windows."""
    normalized = models.normalize(windows, statistics)
    return [normalized, normalized[:, :, ::-1]] if flip else [normalized]


def accumulate_windows(
    protocol: Protocol, sums: jax.Array, logits: list[jax.Array], positions: jax.Array, bounds: jax.Array
) -> jax.Array:
    """Adds the scores of one view's windows to its sums, where they were cut out; in strips, to save memory."""
    _, height, width, num_classes = logits[0].shape
    shape = (1, min(STRIP, height), width, num_classes)
    strips = ceil_div(height, shape[1])

    def add(i: jax.Array, sums: jax.Array) -> jax.Array:
        window, strip = jnp.divmod(i, strips)
        first = jnp.minimum(strip * shape[1], height - shape[1])
        slices = [jax.lax.dynamic_slice(x, (window, first, 0, 0), shape).astype(sums.dtype) for x in logits]
        new = protocol.combine_flip(*slices)
        fresh = first + jnp.arange(shape[1]) >= strip * shape[1]  # the last strip may overlap the one before
        image, top, left = positions[window]
        corner = (image, top + first, left, 0)
        new = jax.lax.dynamic_slice(sums, corner, shape) + jnp.where(fresh[:, None, None], new, 0)
        return jax.lax.dynamic_update_slice(sums, new, corner)

    return jax.lax.fori_loop(bounds[0, 0] * strips, bounds[0, 1] * strips, add, sums)


def accumulate_view(protocol: Protocol, total: jax.Array, sums: jax.Array, to_image: ToImage) -> jax.Array:
    """Adds a view's scores at the images' size to the total f32[m, H, W, K]; in strips, to save memory."""
    strips = total.reshape(-1, STRIP, *total.shape[2:])

    def add(i: jax.Array, strips: jax.Array) -> jax.Array:
        scores = strips[i] + protocol.finalize_scores(_strip(sums, to_image, i))
        return jax.lax.dynamic_update_index_in_dim(strips, scores, i, 0)

    return jax.lax.fori_loop(0, len(strips), add, strips).reshape(total.shape)


def most_probable(protocol: Protocol, total: jax.Array | None, views: list[ViewSums]) -> tuple[jax.Array, jax.Array]:
    """Returns the most probable classes uint8[m, H, W] and the sums of their scores over the views, f32[m, H, W].

    The scores are the total, if any, plus those of the views not in it; in strips, to save memory.
    """
    rows, columns = views[0][1]
    (count, height, _), width = rows.indices.shape, columns.indices.shape[1]
    strips = jnp.zeros((0,)) if total is None else total.reshape(-1, STRIP, width, total.shape[-1])

    def best(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = [] if total is None else [strips[i]]
        scores += [protocol.finalize_scores(_strip(sums, to_image, i)) for sums, to_image in views]
        summed = sum(scores)
        return jnp.argmax(summed, -1).astype(jnp.uint8), jnp.max(summed, -1)

    strips_found = jax.lax.map(best, jnp.arange(count * height // STRIP))
    found, highest = (x.reshape(count, height, width) for x in strips_found)
    accumulated = [*([] if total is None else [total]), *(sums for sums, _ in views)]
    finite = jnp.all(jnp.array([(x < jnp.inf).all((1, 2, 3)) for x in accumulated]), 0)  # argmax returns a class even for NaN
    return jnp.where(finite[:, None, None], found, IGNORE).astype(jnp.uint8), highest


def _strip(sums: jax.Array, to_image: ToImage, i: jax.Array) -> jax.Array:
    """Resamples sums to the i-th strip of the images: f32[m, h, w, K] -> f32[STRIP, W, K]."""
    rows, columns = to_image
    image, first = jnp.divmod(i * STRIP, rows.indices.shape[1])
    indices, weight = (jax.lax.dynamic_slice(x, (image, first, 0), (1, STRIP, x.shape[-1]))[0] for x in rows)
    offset = image * sums.shape[1]  # gathering from the whole array avoids a copy of the image's sums
    strip = resample(sums.reshape(-1, *sums.shape[2:]), ResamplingWeights(indices + offset, weight), 0)
    return resample(strip, ResamplingWeights(*(x[image] for x in columns)), 1)
