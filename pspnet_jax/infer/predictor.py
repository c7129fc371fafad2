"""Prediction of whole images on the devices: scales, overlapping windows and flips. Read this module first.

The path of an image:

    image                    uint8[H, W, 3]
      |  protocol.scale        resampled (and flipped, if the protocol makes the flipped image a view of its own)
      |  image_to_canvas       padded, if it is smaller than a window
    canvas                   [h, w, 3], one for each view                                          on the host: plan.py
      |  plan.batches          cut into windows; a batch may hold several views and images
    windows                  f32[N, y, x, 3]
    ..........................................................................................................
      |  _prepare              normalized (and flipped, if each window goes through the network twice)
      |  network                                                                                 on the devices: here
    logits                   [N, y, x, K], and those of the flipped windows
      |  protocol.combine_flip
      |  _accumulate_windows   added at the windows' positions on the canvas
    sums                     f32[M, h, w, K], one for each view; M images share the devices
      |  canvas.to_image       resampled to the image's size, divided by the number of windows over each pixel
      |  protocol.finalize_scores
      |  _accumulate_view, _most_probable
    labels                   uint8[M, H, W]

`Predictor.groups` groups images, and `Predictor.labels` runs all of the above. protocols.py, based on resample.py, defines what
depends on the protocol; plan.py computes what depends on the image sizes. The network is compiled once, for one batch of
windows, whatever the images, scales or weights (in whole-image inference, once for each image size and scale). The other steps
are compiled a few times for each bucket of sizes.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from pspnet_jax import models, parallel, programs
from pspnet_jax.datasets import IGNORE
from pspnet_jax.errors import UserError
from pspnet_jax.infer import memory
from pspnet_jax.infer.plan import STRIP, Batch, Plan, ToImage, ceil_div, count_windows, plan_images, power_of_two, views_of
from pspnet_jax.infer.protocols import PROTOCOLS, Protocol
from pspnet_jax.infer.resample import ResamplingWeights, resample

logger = logging.getLogger(__name__)
MAX_NETWORKS = 16  # compiled networks to keep, one per window size, least recently used dropped first
Example = dict[str, Any]  # image uint8[H, W, 3] and any other fields of its source
ViewSums = tuple[jax.Array, ToImage]  # sums over windows on the canvas, and the weights that resample them to the image


class Predictor:
    """Runs a network on whole images, whose sizes may differ.

    Images are divided among the devices. Each device passes the windows of its images through the network, at most
    ceil(eval.batch_size / devices) at a time. Each window size has its own batches and its own compiled network. All windows
    have the size eval.crop, except with eval.inference="whole" and, in protocol "mmseg", in images smaller than the crop.
    Scores and their sums are float32, whatever dtype the network computes in.
    """

    def __init__(
        self,
        apply: Callable[[Any, jax.Array], jax.Array],
        config: ConfigDict,
        num_classes: int,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Prepares the programs, which are compiled on first use.

        Args:
          apply: (variables, normalized images f32[N, H, W, 3]) -> logits [N, H, W, K], at any H and W.
          config: its eval, normalize, model.align_corners and model.dtype are used.
          num_classes: K.
          devices: devices of this process; None means all of them.
        """
        self.settings = config.eval
        self._mesh = parallel.make_mesh(devices or jax.local_devices())
        self._sharding = parallel.batch_sharding(self._mesh)
        self._num_classes = num_classes
        self._protocol = protocol = PROTOCOLS[config.eval.protocol](config)
        options = programs.options(config.model.dtype, self._mesh)
        compile_network = functools.partial(_compile_network, apply, num_classes, self._sharding, options)
        self._network = functools.lru_cache(MAX_NETWORKS)(compile_network)  # by window size
        self._prepare = self._on_each_device(_prepare, config.normalize, config.eval.flip and not protocol.flips_views)
        self._accumulate_windows = self._on_each_device(_accumulate_windows, protocol, donate_argnums=0)
        self._accumulate_view = self._on_each_device(_accumulate_view, protocol, donate_argnums=0)
        self._most_probable = self._on_each_device(_most_probable, protocol)

    def _on_each_device(self, function: Callable, *static: Any, **jit_options: Any) -> Callable:
        """Compiles a function to run on each device's shard of arrays that are sharded along their leading axis."""
        # check_vma=True would require marking the zeros that a loop starts from as varying over devices
        spec = PartitionSpec("data")
        function = functools.partial(function, *static)
        return jax.jit(jax.shard_map(function, mesh=self._mesh, in_specs=spec, out_specs=spec, check_vma=False), **jit_options)

    @property
    def description(self) -> dict[str, Any]:
        """The fields of config.eval on which scores depend, as plain values."""
        irrelevant = ["split", "batch_size", "best_metric"]
        irrelevant += ["crop", "stride"] if self.settings.inference == "whole" else []
        fields = {field: value for field, value in self.settings.items() if field not in irrelevant}
        return {field: list(value) if isinstance(value, tuple) else value for field, value in fields.items()}

    @property
    def device(self) -> str:
        """Number and kind of the devices of all processes."""
        return f"{self._mesh.size * jax.process_count()} x {self._mesh.devices.flat[0].device_kind}"

    def place(self, variables: Any) -> Any:
        """Copies weights (NumPy arrays or replicated jax.Arrays) to every device of the predictor, once for many calls."""
        local = jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, variables)
        return jax.device_put(local, parallel.replicated(self._mesh))

    def stream(self, variables: Any, examples: Iterable[Example]) -> Iterator[tuple[list[Example], jax.Array]]:
        """Yields the examples in order, in `groups`, each group with the `labels` of its images."""
        for group in self.groups(examples):
            images = [example["image"] for example in group]
            with memory.explain_out_of_memory(images, self.settings):
                labels = self.labels(variables, images)
            yield group, labels

    def groups(self, examples: Iterable[Example]) -> Iterator[list[Example]]:
        """Yields the examples in order, in groups that have the same window sizes and fill the network's batch."""

        def windows(example: Example) -> Mapping[tuple[int, int], int]:
            try:
                self.check(example["image"])
            except UserError as error:
                raise UserError(f"{example.get('name', 'an example')}: {error}") from error
            height, width, _ = example["image"].shape
            return count_windows(views_of(height, width, self._protocol))

        for _, run in itertools.groupby(examples, lambda example: windows(example).keys()):
            same_windows = iter(run)
            for first in same_windows:
                per_device = ceil_div(self.settings.batch_size, self._mesh.size * max(windows(first).values()))
                yield [first, *itertools.islice(same_windows, self._mesh.size * power_of_two(per_device) - 1)]

    def labels(self, variables: Any, images: Sequence[np.ndarray]) -> jax.Array:
        """Predicts the most probable class of every pixel.

        Args:
          variables: from `place`.
          images: uint8[H, W, 3] each.

        Returns:
          uint8[M, S, T] on the devices. The labels of image i are [i, :H, :W], or all 255 if its scores are not finite (NaN).
          The rest is padding with arbitrary values.

        Raises:
          UserError: see `check`; or the network does not return logits [N, H, W, K].
        """
        plan = self._plan(images)
        return self._most_probable(*self._add_views(variables, plan, plan.held))

    def probabilities(self, variables: Any, images: Sequence[np.ndarray]) -> jax.Array:
        """Returns probabilities f32[M, S, T, K]; otherwise like `labels`."""
        plan = self._plan(images)
        total, _ = self._add_views(variables, plan, held=0)
        assert total is not None
        return total / len(plan.canvases)

    def check(self, image: np.ndarray) -> None:
        """Raises a UserError if an image is not uint8[H, W, 3] or needs more memory than there is."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"an image is {image.dtype}{list(image.shape)}: expected uint8[height, width, 3] (RGB)")
        height, width, _ = image.shape
        memory.check(height, width, self._protocol, self._num_classes, list(self._mesh.devices.flat))

    def log_compilations(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Logs for how many window sizes the network is compiled, given the images' heights and widths."""
        known = {size for size in sizes if all(size)}  # (0, 0) means unknown
        windows = {window for size in known for window in count_windows(views_of(*size, self._protocol))}
        if known:
            logger.info(f"the network is compiled for {len(windows)} window sizes, from {len(known)} image sizes")

    def _plan(self, images: Sequence[np.ndarray]) -> Plan:
        for image in images:
            self.check(image)
        return plan_images(images, self._protocol, self._mesh.size)

    def _add_views(self, variables: Any, plan: Plan, held: int) -> tuple[jax.Array | None, list[ViewSums]]:
        """Returns the sum of all but the last `held` views at the images' size, f32[M, H, W, K], and those last views."""
        remaining = len(plan.canvases) - held
        total = self._zeros(plan.shape) if remaining else None
        last: list[ViewSums] = []
        for view in self._views(variables, plan):
            if remaining:
                total, remaining = self._accumulate_view(total, *view), remaining - 1
            else:
                last.append(view)
            del view  # frees its memory before the next view is computed
        return total, last

    def _views(self, variables: Any, plan: Plan) -> Iterator[ViewSums]:
        """Yields each completed view: its sums over windows, f32[M, h, w, K], and the weights that resample them."""
        sums: dict[int, jax.Array] = {}
        missing = [canvas.num_windows for canvas in plan.canvases]
        for batch in plan.batches:
            positions, parts, logits = batch.positions, batch.parts, self._logits(variables, batch)
            del batch  # frees its pixels, which the devices now have
            for view, bounds in parts:
                if view not in sums:
                    sums[view] = self._zeros((plan.shape[0], *plan.canvases[view].size))
                sums[view] = self._accumulate_windows(sums[view], logits, positions, bounds)
                missing[view] -= np.diff(bounds).sum()
                if not missing[view]:  # yielded at once, so that its memory is free before the next view needs as much
                    yield sums.pop(view), plan.canvases[view].to_image
            del logits  # frees their memory before the next batch

    def _logits(self, variables: Any, batch: Batch) -> list[jax.Array]:
        """Returns the logits [N, y, x, K] of the windows in their frames and, with flip, of the flipped frames."""
        network = self._network(batch.window)
        columns = 0, batch.pixels.shape[2] - batch.window[1]  # where the windows start in the frames and the flipped frames
        frames = self._prepare(jax.device_put(batch.pixels, self._sharding))
        return [network(variables, x, column) for x, column in zip(frames, columns, strict=False)]

    def _zeros(self, shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros((*shape, self._num_classes), device=self._sharding)


def _compile_network(
    apply: Callable, num_classes: int, sharding: jax.NamedSharding, options: Any, window: tuple[int, int]
) -> Callable:
    """Returns (variables, frames f32[N, y, x, 3], column) -> logits [N, y, x, K] of the windows that start at that column."""

    def network(variables: Any, frames: jax.Array, column: jax.Array) -> jax.Array:
        whole, shape = frames.shape[1:3] == window, (len(frames), *window)
        windows = frames if whole else jax.lax.dynamic_slice(frames, (0, 0, column, 0), (*shape, 3))
        logits = apply(variables, windows)
        if logits.shape != (*shape, num_classes):
            raise UserError(
                f"the network returns {list(logits.shape)} for images {[*shape, 3]}: expected {[*shape, num_classes]}, one "
                "score per pixel and class"
            )
        if whole:
            return logits
        zeros = jnp.zeros((*frames.shape[:3], num_classes), logits.dtype)
        return jax.lax.dynamic_update_slice(zeros, logits, (0, 0, column, 0))

    return jax.jit(network, out_shardings=sharding, compiler_options=options)


def _prepare(statistics: ConfigDict, flip: bool, windows: jax.Array) -> list[jax.Array]:
    """Normalizes windows f32[n, h, w, 3]; with `flip`, adds a second batch of flipped windows."""
    normalized = models.normalize(windows, statistics)
    return [normalized, normalized[:, :, ::-1]] if flip else [normalized]


def _accumulate_windows(
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


def _accumulate_view(protocol: Protocol, total: jax.Array, sums: jax.Array, to_image: ToImage) -> jax.Array:
    """Adds a view's scores at the images' size to the total f32[m, H, W, K]; in strips, to save memory."""
    strips = total.reshape(-1, STRIP, *total.shape[2:])

    def add(i: jax.Array, strips: jax.Array) -> jax.Array:
        scores = strips[i] + protocol.finalize_scores(_strip(sums, to_image, i))
        return jax.lax.dynamic_update_index_in_dim(strips, scores, i, 0)

    return jax.lax.fori_loop(0, len(strips), add, strips).reshape(total.shape)


def _most_probable(protocol: Protocol, total: jax.Array | None, views: list[ViewSums]) -> jax.Array:
    """Returns the labels uint8[m, H, W] from the total, if any, plus the views not in it; in strips, to save memory."""
    rows, columns = views[0][1]
    (count, height, _), width = rows.indices.shape, columns.indices.shape[1]
    strips = jnp.zeros((0,)) if total is None else total.reshape(-1, STRIP, width, total.shape[-1])

    def labels(i: jax.Array) -> jax.Array:
        scores = [] if total is None else [strips[i]]
        scores += [protocol.finalize_scores(_strip(sums, to_image, i)) for sums, to_image in views]
        return jnp.argmax(sum(scores), -1).astype(jnp.uint8)

    found = jax.lax.map(labels, jnp.arange(count * height // STRIP)).reshape(count, height, width)
    accumulated = [*([] if total is None else [total]), *(sums for sums, _ in views)]
    finite = jnp.all(jnp.array([(x < jnp.inf).all((1, 2, 3)) for x in accumulated]), 0)  # argmax returns a class even for NaN
    return jnp.where(finite[:, None, None], found, IGNORE).astype(jnp.uint8)


def _strip(sums: jax.Array, to_image: ToImage, i: jax.Array) -> jax.Array:
    """Resamples sums to the i-th strip of the images: f32[m, h, w, K] -> f32[STRIP, W, K]."""
    rows, columns = to_image
    image, first = jnp.divmod(i * STRIP, rows.indices.shape[1])
    indices, weight = (jax.lax.dynamic_slice(x, (image, first, 0), (1, STRIP, x.shape[-1]))[0] for x in rows)
    offset = image * sums.shape[1]  # gathering from the whole array avoids a copy of the image's sums
    strip = resample(sums.reshape(-1, *sums.shape[2:]), ResamplingWeights(indices + offset, weight), 0)
    return resample(strip, ResamplingWeights(*(x[image] for x in columns)), 1)
