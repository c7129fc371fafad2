"""Prediction of whole images on the devices: all scales, overlapping windows and mirror images.

What an image's size decides comes as data (see plan.py), what a protocol decides as functions (see protocol.py). The network
is one compiled program for one batch of windows, whatever the images, scales or weights; what is around it takes a few programs
for each bucket of sizes.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from pspnet_jax import models, parallel
from pspnet_jax.infer.layout import lay_out
from pspnet_jax.infer.plan import STRIP, Plan, Window, plan_images, power_of_two
from pspnet_jax.infer.protocols import PROTOCOLS
from pspnet_jax.infer.resample import Taps, along

Example = dict[str, Any]  # image uint8[H, W, 3], and what else its source gives


class Predictor:
    """Runs a network over whole images, of any sizes together.

    Images are shared out among the devices, and each takes the windows of its own through the network,
    ceil(eval.batch_size / devices) at a time, or fewer where there are fewer; where a protocol mirrors windows, the mirror
    images of these follow as a second batch. Windows of each size (all have eval.crop, but those of eval.inference="whole" and,
    in protocol "mmseg", of images smaller than it) have their own batches and compile their own network. Probabilities
    and their sums are float32 whatever the network computes in.
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
          config: of which eval, normalize and model.align_corners are used.
          num_classes: K.
          devices: of this process; None: all of them.
        """
        self._config = config
        self._mesh = parallel.make_mesh(devices or jax.local_devices())
        self._sharding = parallel.batch_sharding(self._mesh)
        self._num_classes = num_classes
        protocol = PROTOCOLS[config.eval.protocol]
        self._mirror_windows = config.eval.flip and not protocol.mirror_views
        normalize = functools.partial(models.normalize, statistics=config.normalize)
        self._draw = self._on_each_device(functools.partial(_draw, draw=protocol.draw, normalize=normalize))
        self._network = jax.jit(apply, out_shardings=self._sharding)
        self._mirror = self._on_each_device(lambda windows: windows[:, :, ::-1])
        self._add = self._on_each_device(functools.partial(_add, merge=protocol.merge), donate_argnums=0)
        self._accumulate = self._on_each_device(functools.partial(_accumulate, settle=protocol.settle), donate_argnums=0)
        self._label_strips = self._on_each_device(functools.partial(_label_strips, settle=protocol.settle))
        self._label = self._on_each_device(_most_probable)

    def _on_each_device(self, function: Callable, **jit_options: Any) -> Callable:
        """Compiles a function of arrays whose leading axis is shared out, to be run on each device's share."""
        # check_vma=False: it wants the zeros that a loop starts from marked as differing between devices
        spec = PartitionSpec("data")
        sharded = jax.shard_map(function, mesh=self._mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.jit(sharded, **jit_options)

    @property
    def description(self) -> dict[str, Any]:
        """What makes scores comparable: the fields of config.eval that decide them."""
        settings = self._config.eval
        irrelevant = {"split", "batch_size"} | ({"crop", "stride"} if settings.inference == "whole" else set())
        fields = {field: value for field, value in settings.items() if field not in irrelevant}
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
          uint8[M, S, T], on the devices: image i has [i, :H, :W], and the rest, up to compiled sizes, means nothing.
        """
        plan = self._plan(images)
        if plan.together:
            return self._label_strips(list(self._views(variables, plan)))
        return self._label(self._total(variables, plan))

    def probabilities(self, variables: Any, images: Sequence[np.ndarray]) -> jax.Array:
        """As `labels`, but returns probabilities f32[M, S, T, K]."""
        plan = self._plan(images)
        return self._total(variables, plan) / len(plan.outward)

    def stream(self, variables: Any, examples: Iterable[Example]) -> Iterator[tuple[list[Example], jax.Array]]:
        """Yields the examples in order, in groups that fill the network's batch, each with the `labels` of its images."""
        group: list[Example] = []
        windows: collections.Counter[tuple[int, int]] = collections.Counter()
        for example in examples:
            before, windows = windows, self._windows(*example["image"].shape[:2])
            if group and windows.keys() != before.keys():
                yield group, self._group_labels(variables, group)
                group = []
            if not group:
                full = self._images_to_fill(max(windows.values()))
            group.append(example)
            if len(group) == full:
                yield group, self._group_labels(variables, group)
                group = []
        if group:
            yield group, self._group_labels(variables, group)

    def _group_labels(self, variables: Any, group: list[Example]) -> jax.Array:
        return self.labels(variables, [example["image"] for example in group])

    def _windows(self, height: int, width: int) -> collections.Counter[tuple[int, int]]:
        """Counts the windows of each size."""
        counts: collections.Counter[tuple[int, int]] = collections.Counter()
        for rows, columns, _ in lay_out(height, width, self._config.eval):
            counts[rows.window, columns.window] += len(rows.starts) * len(columns.starts)
        return counts

    def _images_to_fill(self, windows: int) -> int:
        """Returns how many images of so many windows of a size fill a batch of the network."""
        return self._mesh.size * power_of_two(-(-self._config.eval.batch_size // (self._mesh.size * windows)))

    def _plan(self, images: Sequence[np.ndarray]) -> Plan:
        assert all(image.dtype == np.uint8 and image.shape[2:] == (3,) for image in images)
        return plan_images(images, self._config, self._mesh.size)

    def _total(self, variables: Any, plan: Plan) -> jax.Array:
        """Adds the views up at the images' size, f32[M, H, W, K], one by one as they are done."""
        total = jnp.zeros((*plan.images.shape[:3], self._num_classes), device=self._sharding)
        for view in self._views(variables, plan):
            total = self._accumulate(total, *view)
            del view  # here, not when the next one is done
        return total

    def _views(self, variables: Any, plan: Plan) -> Iterator[tuple[jax.Array, tuple[Taps, Taps]]]:
        """Yields each view's sums over windows on its canvas, f32[M, h, w, K], and its taps, when it is done."""
        images = jax.device_put(plan.images, self._sharding)
        sums: dict[int, jax.Array] = {}
        for batch in plan.batches:
            windows = self._draw(images, batch.windows)
            both = [windows, self._mirror(windows)] if self._mirror_windows else [windows]
            logits = [self._network(variables, x) for x in both]
            for view, bounds in batch.parts:
                if view not in sums:
                    shape = (len(images), *plan.canvases[view], self._num_classes)
                    sums[view] = jnp.zeros(shape, device=self._sharding)
                sums[view] = self._add(sums[view], logits, batch.windows.place, bounds)
                if view in batch.finished:  # before the next view needs as much memory
                    yield sums.pop(view), plan.outward[view]
            del logits  # before the next ones


def _draw(images: jax.Array, windows: Window, draw: Callable, normalize: Callable) -> jax.Array:
    """Draws windows, normalized f32[n, h, w, 3], from images uint8[m, H, W, 3]."""

    def one(window: Window) -> jax.Array:
        inside = (window.rows.weight.sum(-1) > 0)[:, None, None] & (window.columns.weight.sum(-1) > 0)[:, None]
        drawn = draw(images[window.place[0]], window.rows, window.columns, window.rows_first)
        return normalize(jnp.where(inside, drawn, window.padding))

    return jax.lax.map(one, windows)


def _add(sums: jax.Array, logits: list, places: jax.Array, bounds: jax.Array, merge: Callable) -> jax.Array:
    """Adds what the network says of the windows of one view to its sums, where they were drawn; in strips, for memory."""
    _, height, width, num_classes = logits[0].shape
    shape = (1, min(STRIP, height), width, num_classes)
    strips = -(-height // shape[1])

    def add(i: jax.Array, sums: jax.Array) -> jax.Array:
        window, strip = jnp.divmod(i, strips)
        first = jnp.minimum(strip * shape[1], height - shape[1])
        new = merge(*(jax.lax.dynamic_slice(x, (window, first, 0, 0), shape) for x in logits))
        fresh = first + jnp.arange(shape[1]) >= strip * shape[1]  # the last strip may begin within the one before
        image, top, left = places[window]
        place = (image, top + first, left, 0)
        new = jax.lax.dynamic_slice(sums, place, shape) + jnp.where(fresh[:, None, None], new, 0)
        return jax.lax.dynamic_update_slice(sums, new, place)

    return jax.lax.fori_loop(bounds[0, 0] * strips, bounds[0, 1] * strips, add, sums)


def _accumulate(total: jax.Array, sums: jax.Array, outward: tuple[Taps, Taps], settle: Callable) -> jax.Array:
    """Adds a view, resized and settled, to the total f32[m, H, W, K]; in strips, for memory."""
    strips = total.reshape(-1, STRIP, *total.shape[2:])

    def add(i: jax.Array, strips: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(strips, strips[i] + settle(_strip(sums, outward, i)), i, 0)

    return jax.lax.fori_loop(0, len(strips), add, strips).reshape(total.shape)


def _label_strips(views: list, settle: Callable) -> jax.Array:
    """Returns the labels uint8[m, H, W] that all views give together; K numbers a pixel exist for one strip at a time."""
    rows, columns = views[0][1]
    count, height, _ = rows.pixel.shape

    def labels(i: jax.Array) -> jax.Array:
        return _most_probable(sum(settle(_strip(sums, outward, i)) for sums, outward in views))

    strips = jax.lax.map(labels, jnp.arange(count * height // STRIP))
    return strips.reshape(count, height, columns.pixel.shape[1])


def _strip(sums: jax.Array, outward: tuple[Taps, Taps], i: jax.Array) -> jax.Array:
    """Resizes to the i-th strip of the images: f32[m, h, w, K] -> f32[STRIP, W, K]."""
    rows, columns = outward
    image, first = jnp.divmod(i * STRIP, rows.pixel.shape[1])
    pixel, weight = (jax.lax.dynamic_slice(x, (image, first, 0), (1, STRIP, x.shape[-1]))[0] for x in rows)
    below = image * sums.shape[1]  # gathers from the whole array, so that no image of it has to be copied
    strip = along(sums.reshape(-1, *sums.shape[2:]), Taps(pixel + below, weight), 0)
    return along(strip, Taps(*(x[image] for x in columns)), 1)


def _most_probable(probabilities: jax.Array) -> jax.Array:
    return jnp.argmax(probabilities, -1).astype(jnp.uint8)
