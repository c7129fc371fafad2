"""Prediction of whole images on the devices: scales, overlapping windows and flips. Read this module first.

The path of an image:

    image                    [H, W, C], such as uint8[H, W, 3]
      |  protocol.scale        resampled (and flipped, if the protocol makes the flipped image a view of its own)
      |  image_to_canvas       padded, if it is smaller than a window
    canvas                   [h, w, C], one for each view                                          on the host: plan.py
      |  plan.batches          cut into windows; a batch may hold several views and images
    windows                  f32[N, y, x, C]
    ..........................................................................................................
      |  prepare               normalized (and flipped, if each window goes through the network twice)
      |  network                                                                              on the devices: steps.py
    logits                   [N, y, x, K], and those of the flipped windows
      |  protocol.combine_flip
      |  accumulate_windows    added at the windows' positions on the canvas
    sums                     f32[M, h, w, K], one for each view; M images share the devices
      |  canvas.to_image       resampled to the image's size, divided by the number of windows over each pixel
      |  protocol.finalize_scores
      |  accumulate_view, most_probable
    labels                   uint8[M, H, W]

`Predictor.groups` groups images (groups.py), and `Predictor.labels` runs all of the above. protocols.py, based on resample.py,
defines what depends on the protocol; plan.py computes what depends on the image sizes. The network is compiled once, for one
batch of windows, whatever the images, scales or weights (in whole-image inference, once for each image size and scale). The
other steps are compiled a few times for each bucket of sizes.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Compiled, Wrapped
from ml_collections import ConfigDict

from pspnet_jax import parallel, programs
from pspnet_jax.errors import UserError
from pspnet_jax.image_files import PixelFormat
from pspnet_jax.infer import memory, steps
from pspnet_jax.infer.groups import Example, form_groups
from pspnet_jax.infer.plan import Batch, Plan, View, WindowCounts, ceil_div, count_windows, frame_size, plan_images, views_of
from pspnet_jax.infer.protocols import PROTOCOLS
from pspnet_jax.infer.steps import ViewSums

logger = logging.getLogger(__name__)
MAX_NETWORKS = 16  # compiled networks to keep, one per window size, least recently used dropped first


class Predictor:
    """Runs a network on whole images, whose sizes may differ.

    Images are divided among the devices. Each device passes the windows of its images through the network, at most
    ceil(eval.batch_size / devices) at a time; 0 stands for the value from `memory.choose_batch_size`. With
    parallel.spatial=n, groups of n devices take the place of a device, and each of them computes a part of a window's rows in
    the network. Each window size has its own batches and its own compiled network. All windows have the size eval.crop, except
    with eval.inference="whole" and, in protocol "mmseg", in images smaller than the crop. Scores and their sums are float32,
    whatever dtype the network computes in.

    Attributes:
      pixel_format: of the images.
      mesh: its devices, of which those along "spatial" share images.
      windows: number of windows that went through the network so far.
      slots: number of windows for which there was room in these forward passes, on all devices of this process.
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
          apply: (variables, normalized images f32[N, H, W, C]) -> logits [N, H, W, K], at any H and W.
          config: its eval, normalize, model.align_corners, model.channels, model.dtype and dataset.image_dtype are used.
          num_classes: K.
          devices: devices of this process; None means all of them.
        """
        self.settings = config.eval
        self.pixel_format = PixelFormat(config.model.channels, config.dataset.image_dtype)
        devices = devices or jax.local_devices()
        self.mesh = parallel.make_mesh(devices, math.gcd(len(devices), config.parallel.spatial))
        self._groups = self.mesh.shape["data"]  # of devices; the devices of a group share images
        self._sharding = parallel.batch_sharding(self.mesh)
        self._num_classes = num_classes
        self._batch_size, self._bytes_per_pixel = config.eval.batch_size, 0.0  # until they are chosen and measured
        self.windows = self.slots = 0
        self._protocol = protocol = PROTOCOLS[config.eval.protocol](config)
        options = programs.options(config.model.dtype, self.mesh)
        compile_network = functools.partial(_compile_network, apply, num_classes, self.mesh, options)
        self._network = functools.lru_cache(MAX_NETWORKS)(compile_network)  # by window size
        self._reorder = jax.jit(lambda array, rows: array[rows], out_shardings=self._sharding)
        self._prepare = self._on_each_device(steps.prepare, config.normalize, protocol.passes == 2)
        self._accumulate_windows = self._on_each_device(steps.accumulate_windows, protocol, donate_argnums=0)
        self._accumulate_view = self._on_each_device(steps.accumulate_view, protocol, donate_argnums=0)
        self._most_probable = self._on_each_device(steps.most_probable, protocol)

    def _on_each_device(self, function: Callable, *static: Any, **jit_options: Any) -> Callable:
        """Compiles a function to run on each device's shard of arrays that are sharded along their leading axis."""
        # check_vma=True would require marking the zeros that a loop starts from as varying over devices
        spec = PartitionSpec("data")
        function = functools.partial(function, *static)
        return jax.jit(jax.shard_map(function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False), **jit_options)

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
        return f"{self.mesh.size * jax.process_count()} x {self.mesh.devices.flat[0].device_kind}"

    def place(self, variables: Any) -> Any:
        """Copies weights (NumPy arrays or replicated jax.Arrays) to every device of the predictor, once for many calls."""
        local = jax.tree.map(parallel.local, variables)
        return jax.device_put(local, parallel.replicated(self.mesh))

    def stream(self, variables: Any, examples: Iterable[Example]) -> Iterator[tuple[list[Example], jax.Array, jax.Array]]:
        """Yields all examples in `groups`, each group with the `labels_and_confidence` of its images."""
        for group in self.groups(variables, examples):
            images = [example["image"] for example in group]
            with self.explain_out_of_memory(images):
                labels, confidence = self.labels_and_confidence(variables, images)
            yield group, labels, confidence

    def groups(self, variables: Any, examples: Iterable[Example]) -> Iterator[list[Example]]:
        """Yields the examples, on one device in order, in groups for `labels`, see `form_groups`."""

        def windows(example: Example) -> WindowCounts:
            try:
                self.check(example["image"])
            except UserError as error:
                raise UserError(f"{example.get('name', 'an example')}: {error}") from error
            height, width, _ = example["image"].shape
            return count_windows(self.views(height, width))

        def room(example: Example) -> int:
            height, width, _ = example["image"].shape
            return memory.room_for_images(height, width, self._protocol, self._num_classes, self._devices)

        return form_groups(examples, windows, room, functools.partial(self._max_windows, variables), self._groups)

    def explain_out_of_memory(self, images: Sequence[np.ndarray]) -> AbstractContextManager[None]:
        """Turns an out-of-memory error into a UserError that names the images' sizes and the settings to lower."""
        return memory.explain_out_of_memory(images, self.settings, self._batch_size)

    def labels(self, variables: Any, images: Sequence[np.ndarray]) -> jax.Array:
        """Predicts the most probable class of every pixel.

        Args:
          variables: from `place`.
          images: [H, W, C] each, of the `pixel_format`.

        Returns:
          uint8[M, S, T] on the devices. The labels of image i are [i, :H, :W], or all 255 if its scores are not finite (NaN).
          The rest is padding with arbitrary values.

        Raises:
          UserError: see `check`; or the network does not return logits [N, H, W, K].
        """
        return self.labels_and_confidence(variables, images)[0]

    def labels_and_confidence(self, variables: Any, images: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        """Returns the `labels` and their probabilities f32[M, S, T], which cost no further pass through the network."""
        with jax.enable_x64(False):
            plan = self._plan(variables, images)
            labels, summed = self._most_probable(*self._add_views(variables, plan, plan.held))
            return self._in_order(labels, plan), self._in_order(summed / len(plan.canvases), plan)

    def probabilities(self, variables: Any, images: Sequence[np.ndarray]) -> jax.Array:
        """Returns probabilities f32[M, S, T, K]; otherwise like `labels`."""
        with jax.enable_x64(False):
            plan = self._plan(variables, images)
            total, _ = self._add_views(variables, plan, held=0)
            assert total is not None
            return self._in_order(total / len(plan.canvases), plan)

    def views(self, height: int, width: int) -> list[View]:
        """Returns the views of an image, with the positions of their windows."""
        return views_of(height, width, self._protocol)

    def check(self, image: np.ndarray) -> None:
        """Raises a UserError if an image is not of the `pixel_format` or needs more memory than there is."""
        channels, dtype = self.pixel_format
        if image.dtype != dtype or image.shape[2:] != (channels,) or not image.size:
            expected = f"{dtype}[height, width, {channels}]" + " (RGB)" * (channels == 3)
            raise UserError(f"an image is {image.dtype}{list(image.shape)}: expected {expected}")
        height, width, _ = image.shape
        memory.check(height, width, self._protocol, self._num_classes, self._devices)

    def log_compilations(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Logs for how many window sizes the network is compiled, given the images' heights and widths."""
        known = {size for size in sizes if all(size)}  # (0, 0) means unknown
        windows = {window for size in known for window in count_windows(self.views(*size))}
        if known:
            logger.info(f"the network is compiled for {len(windows)} window size(s), from {len(known)} image size(s)")

    @property
    def _devices(self) -> list[jax.Device]:
        """The first device of each group."""
        return list(self.mesh.devices[:, 0])

    def _plan(self, variables: Any, images: Sequence[np.ndarray]) -> Plan:
        for image in images:
            self.check(image)
        max_windows = functools.partial(self._max_windows, variables)
        return plan_images(images, self._protocol, self._groups, max_windows)

    def _max_windows(self, variables: Any, window: tuple[int, int]) -> int:
        """Returns the maximum number of windows of a size per device and forward pass."""
        if not self.settings.batch_size:
            measure = functools.partial(self.bytes_per_pixel, variables, window)
            self._batch_size = memory.choose_batch_size(window, self._devices, measure)
        return ceil_div(self._batch_size, self._groups)

    def compile_network(self, variables: Any, window: tuple[int, int], windows: int = 1) -> Compiled:
        """Compiles a forward pass of `windows` windows of a size on each device, given the weights or their shapes."""
        shape = (self._groups * windows, *frame_size(window, self._protocol), self.pixel_format.channels)
        frames = jax.ShapeDtypeStruct(shape, np.float32, sharding=self._sharding)
        with jax.enable_x64(False):
            return self._network(window).lower(variables, frames, 0).compile()

    def bytes_per_pixel(self, variables: Any, window: tuple[int, int]) -> float:
        """Returns the memory that a device needs per pixel of a window; compiles the network for one window, once."""
        if not self._bytes_per_pixel:
            stats = self.compile_network(variables, window).memory_analysis()
            passes, values = self._protocol.passes, self.pixel_format.channels * math.prod(window)
            pixels = 4 * values * (1 + passes)  # windows as they come, normalized and flipped
            needed = stats.temp_size_in_bytes + passes * stats.output_size_in_bytes + pixels if stats else math.inf
            self._bytes_per_pixel = needed / math.prod(window)
            logger.info(
                "eval.batch_size=0: chosen from the memory of a device, of which a window of %dx%d needs %.2f GiB",
                *window,
                needed / 2**30,
            )
        return self._bytes_per_pixel

    def _in_order(self, array: jax.Array, plan: Plan) -> jax.Array:
        """Returns an array [M, ...] in the order of the images."""
        return array if (np.diff(plan.rows) == 1).all() else self._reorder(array, plan.rows)

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
        self.windows += sum(int(np.diff(bounds).sum()) for _, bounds in batch.parts)
        self.slots += len(batch.pixels)
        network = self._network(batch.window)
        columns = 0, batch.pixels.shape[2] - batch.window[1]  # where the windows start in the frames and the flipped frames
        frames = self._prepare(jax.device_put(batch.pixels, self._sharding))
        return [network(variables, x, column) for x, column in zip(frames, columns, strict=False)]

    def _zeros(self, shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros((*shape, self._num_classes), device=self._sharding)


def _compile_network(apply: Callable, num_classes: int, mesh: Mesh, options: Any, window: tuple[int, int]) -> Wrapped:
    """Returns (variables, frames f32[N, y, x, C], column) -> logits [N, y, x, K] of the windows that start at that column."""

    def network(variables: Any, frames: jax.Array, column: jax.Array) -> jax.Array:
        whole, shape, channels = frames.shape[1:3] == window, (len(frames), *window), frames.shape[3]
        windows = frames if whole else jax.lax.dynamic_slice(frames, (0, 0, column, 0), (*shape, channels))
        logits = apply(variables, parallel.shard_height(windows, mesh))
        if logits.shape != (*shape, num_classes):
            raise UserError(
                f"the network returns {list(logits.shape)} for images {[*shape, channels]}: expected "
                f"{[*shape, num_classes]}, one score per pixel and class"
            )
        if whole:
            return logits
        zeros = jnp.zeros((*frames.shape[:3], num_classes), logits.dtype)
        return jax.lax.dynamic_update_slice(zeros, logits, (0, 0, column, 0))

    return jax.jit(network, out_shardings=parallel.batch_sharding(mesh), compiler_options=options)
