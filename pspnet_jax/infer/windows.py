"""Prediction of whole images on the devices: all scales, overlapping windows and mirror images.

What an image's size decides comes as data (see protocol.py). The network is one compiled program for one batch of windows,
whatever the images, scales or weights; what is around it takes a few programs for each bucket of longest sides.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from pspnet_jax import models, parallel
from pspnet_jax.infer.protocol import PROTOCOLS, STRIP, Taps, plan_image, plan_images, power_of_two

Example = dict[str, Any]  # image uint8[H, W, 3], and what else its source gives


class Predictor:
    """Runs a network over whole images, of any sizes together (eval.inference="whole": of one size together).

    Images are shared out among the devices, and each takes the windows of its own through the network,
    ceil(eval.batch_size / devices) at a time, or fewer where there are fewer; with eval.flip, the mirror images of these
    follow as a second batch. Probabilities and their sums are float32 whatever the network computes in.
    """

    def __init__(
        self,
        apply: Callable[[Any, jax.Array], jax.Array],
        config: ConfigDict,
        num_classes: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Prepares the programs, which compile when first needed.

        Args:
          apply: (variables, normalized images f32[N, H, W, 3]) -> logits [N, H, W, K], at any H and W.
          config: of which eval and normalize are used.
          num_classes: K.
          devices: of this process; None: all of them.
        """
        self._settings = config.eval
        self._mesh = parallel.make_mesh(devices or jax.local_devices())
        normalize = functools.partial(models.normalize, statistics=config.normalize)
        merge = PROTOCOLS[config.eval.protocol].merge
        self._network = jax.jit(apply, out_shardings=parallel.batch_sharding(self._mesh))
        self._draw = self._on_each_device(functools.partial(_draw, normalize=normalize, num_classes=num_classes))
        self._cut = self._on_each_device(functools.partial(_cut, flip=config.eval.flip), static_argnames="window")
        self._add = self._on_each_device(functools.partial(_add, merge=merge), donate_argnums=0)
        self._finish = self._on_each_device(_finish, static_argnames="finish")

    def _on_each_device(self, function: Callable, **jit_options: Any) -> Callable:
        """Compiles a function of arrays whose leading axis is shared out, to be run on each device's share."""

        def sharded(*args: Any, **static: Any) -> Any:
            # check_vma=False: it wants the zeros that a loop starts from marked as differing between devices
            spec = PartitionSpec("data")
            local = functools.partial(function, **static)
            return jax.shard_map(local, mesh=self._mesh, in_specs=spec, out_specs=spec, check_vma=False)(*args)

        return jax.jit(sharded, **jit_options)

    @property
    def description(self) -> dict[str, Any]:
        """What makes scores comparable: the fields of config.eval that decide them."""
        irrelevant = {"split", "batch_size"} | ({"crop"} if self._settings.inference == "whole" else set())
        fields = {field: value for field, value in self._settings.items() if field not in irrelevant}
        return {field: list(value) if isinstance(value, tuple) else value for field, value in fields.items()}

    @property
    def device_kind(self) -> str:
        return self._mesh.devices.flat[0].device_kind

    @property
    def num_devices(self) -> int:
        return self._mesh.size

    def place(self, variables: Any) -> Any:
        """Copies weights to every device, once for many calls.

        Args:
          variables: NumPy arrays, or jax.Arrays that have the same value on all devices, also those of other processes.
        """

        def local(x: Any) -> Any:
            return x.addressable_data(0) if isinstance(x, jax.Array) else x

        return jax.device_put(jax.tree.map(local, variables), parallel.replicated(self._mesh))

    def labels(self, variables: Any, images: Sequence[np.ndarray]) -> jax.Array:
        """Predicts the most probable class of every pixel.

        Args:
          variables: from `place`.
          images: uint8[H, W, 3] each.

        Returns:
          uint8[M, S, S], on the devices: image i has [i, :H, :W], and the rest, up to compiled sizes, means nothing.
        """
        return self._predict(variables, images, _most_probable)

    def probabilities(self, variables: Any, images: Sequence[np.ndarray]) -> jax.Array:
        """As `labels`, but returns probabilities f32[M, S, S, K]."""
        return self._predict(variables, images, _unchanged)

    def stream(self, variables: Any, examples: Iterable[Example]) -> Iterator[tuple[list[Example], jax.Array]]:
        """Yields the examples in order, in groups that fill the network's batch, each with the `labels` of its images."""
        group: list[Example] = []
        full = 0
        for example in examples:
            size = example["image"].shape[:2]
            if not group:
                full = self._images_to_fill(*size)
            elif self._settings.inference == "whole" and size != group[0]["image"].shape[:2]:
                yield self._with_labels(variables, group)
                group = []
            group.append(example)
            if len(group) == full:
                yield self._with_labels(variables, group)
                group = []
        if group:
            yield self._with_labels(variables, group)

    def _with_labels(self, variables: Any, group: list[Example]) -> tuple[list[Example], jax.Array]:
        return group, self.labels(variables, [example["image"] for example in group])

    def _images_to_fill(self, height: int, width: int) -> int:
        """Returns how many such images have enough windows for a full batch of the network."""
        scales = [len(rows.starts) * len(columns.starts) for rows, columns in plan_image(height, width, self._settings)]
        windows = 1 if self._settings.inference == "whole" else sum(scales)  # whole: each scale is a batch of its own
        return self._mesh.size * power_of_two(-(-self._settings.batch_size // (self._mesh.size * windows)))

    def _predict(self, variables: Any, images: Sequence[np.ndarray], finish: Callable) -> jax.Array:
        assert all(image.dtype == np.uint8 and image.shape[2:] == (3,) for image in images)
        assert self._settings.inference == "windows" or len({image.shape for image in images}) == 1, "sizes differ"
        plan = plan_images(images, self._settings, self._mesh.size)
        canvases, sums = self._draw(plan.images, plan.inward)
        for run in plan.runs:
            for entries, bounds in zip(run.entries, run.bounds, strict=True):
                windows = self._cut(canvases[run.scales], entries, bounds, window=run.window)
                logits = [self._network(variables, batch) for batch in windows]
                sums[run.scales] = self._add(sums[run.scales], logits, entries, bounds)
        return self._finish(sums, plan.outward, finish=finish)


def _draw(images: jax.Array, inward: list, normalize: Callable, num_classes: int) -> tuple[list, list]:
    """Returns for each scale the canvases f32[m, s, s, 3] of images uint8[m, S, S, 3], and sums f32[m, s, s, K] of nothing."""
    images = normalize(images)
    each = jnp.arange(len(images))
    canvases = [jax.vmap(functools.partial(_resample, images))(each, rows, columns) for rows, columns in inward]
    return canvases, [jnp.zeros((*canvas.shape[:3], num_classes)) for canvas in canvases]


def _cut(canvases: list, entries: jax.Array, bounds: jax.Array, window: tuple[int, int], flip: bool) -> list:
    """Returns the windows f32[n, h, w, 3] at the entries, and with flip their mirror images."""
    batch = jnp.zeros((len(entries), *window, 3))
    for scale, canvas in enumerate(canvases):

        def copy(i: jax.Array, batch: jax.Array, canvas: jax.Array = canvas) -> jax.Array:
            piece = jax.lax.dynamic_slice(canvas, (*entries[i], 0), (1, *window, 3))
            return jax.lax.dynamic_update_slice(batch, piece, (i, 0, 0, 0))

        batch = jax.lax.fori_loop(bounds[0, scale], bounds[0, scale + 1], copy, batch)
    return [batch, batch[:, :, ::-1]] if flip else [batch]


def _add(sums: list, logits: list, entries: jax.Array, bounds: jax.Array, merge: Callable) -> list:
    """Adds what the network says of each window to the sums, where the window was cut."""

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        new = merge(*(jax.lax.dynamic_slice_in_dim(x, i, 1) for x in logits))
        place = (*entries[i], 0)
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, place, new.shape) + new, place)

    return [jax.lax.fori_loop(bounds[0, s], bounds[0, s + 1], add, total) for s, total in enumerate(sums)]


def _finish(sums: list, outward: list, finish: Callable) -> jax.Array:
    """Returns `finish` of the mean over scales, f32[..., K], at every pixel of images [m, S, S]; a strip of rows at a time,
    so that K probabilities a pixel of the image never exist at once unless `finish` keeps them."""
    count, side, _ = outward[0][0].pixel.shape
    strips = [Taps(*(x.reshape(-1, STRIP, x.shape[-1]) for x in rows)) for rows, _ in outward]

    def strip(i: jax.Array, rows: list) -> jax.Array:
        columns = [Taps(*(x[i] for x in scale)) for _, scale in outward]
        return finish(sum(map(_resample, sums, [i] * len(sums), rows, columns)) / len(sums))

    finished = jax.lax.map(lambda x: strip(*x), (jnp.repeat(jnp.arange(count), side // STRIP), strips))
    return finished.reshape(count, side, *finished.shape[2:])


def _most_probable(probabilities: jax.Array) -> jax.Array:
    return jnp.argmax(probabilities, -1).astype(jnp.uint8)


def _unchanged(probabilities: jax.Array) -> jax.Array:
    return probabilities


def _resample(images: jax.Array, i: jax.Array, rows: Taps, columns: Taps) -> jax.Array:
    """Image i of f32[m, h, w, C] -> f32[H, W, C]. Gathers: products with dense matrices took 7 to 20 times longer on a CPU."""
    taps = [images[i, rows.pixel[:, t]] * rows.weight[:, t, None, None] for t in range(rows.pixel.shape[-1])]
    image = functools.reduce(jnp.add, taps)
    taps = [image[:, columns.pixel[:, t]] * columns.weight[:, t, None] for t in range(columns.pixel.shape[-1])]
    return functools.reduce(jnp.add, taps)
