"""Exports a network with its weights and preprocessing as a program for other runtimes: images in, labels or probabilities out.

`FORMATS` names the writers; `stablehlo`, `savedmodel`, `tflite` and `onnx` each have one. `Program` is what they write.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from pspnet_jax import datasets, files, models
from pspnet_jax.errors import UserError

ANY_SIZE = (0, 0)
SMALLEST = 33  # pixels per side of an image, as in `validation`
PLATFORMS = ("cpu", "cuda", "tpu")  # for which StableHLO is lowered


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of images that contains a network's weights and preprocessing."""

    config: ConfigDict  # its model, normalize and dataset are used
    variables: Any  # of the network, as NumPy arrays
    outputs: str = "labels"  # or "probabilities"
    batch: int = 1  # N, or 0 for any number of images
    size: tuple[int, int] = ANY_SIZE  # (H, W) in pixels

    @functools.cached_property
    def model(self) -> nn.Module:
        model = self.config.model.copy_and_resolve_references()
        model.remat = "none"  # it concerns the gradient alone
        return models.build(model, len(self.config.dataset.class_names))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Segments RGB images: uint8[N, H, W, 3] -> labels uint8[N, H, W] or probabilities f32[N, H, W, K]."""
        logits: Any = self.model.apply(self.variables, models.normalize(images, self.config.normalize), train=False)
        return jnp.argmax(logits, -1).astype(jnp.uint8) if self.outputs == "labels" else jax.nn.softmax(logits)

    @property
    def polymorphic_shape(self) -> str:
        """The shape of the images in the notation of `jax.export.symbolic_shape`, such as "n, 473, 473, 3"."""
        size = "h, w" if self.size == ANY_SIZE else "{}, {}".format(*self.size)
        return f"{self.batch or 'n'}, {size}, 3"

    @property
    def constraints(self) -> tuple[str, ...]:
        """What `polymorphic_shape` requires of its symbols."""
        return (f"h >= {SMALLEST}", f"w >= {SMALLEST}") if self.size == ANY_SIZE else ()

    @property
    def images(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the images, with symbols for what is not fixed."""
        shape = jax.export.symbolic_shape(self.polymorphic_shape, constraints=self.constraints)
        return jax.ShapeDtypeStruct(shape, np.uint8)

    def in_float32(self) -> "Program":
        """Returns the program with a network that computes in float32, for runtimes without bfloat16."""
        config = self.config.copy_and_resolve_references()
        config.model.dtype = "float32"
        return dataclasses.replace(self, config=config)

    def describe(self) -> dict[str, Any]:
        """Returns what a user of the file has to know, as plain values."""
        info = datasets.describe(self.config.dataset)
        shape = [self.batch or "N", *(self.size if self.size != ANY_SIZE else "HW")]
        output = ("uint8", shape) if self.outputs == "labels" else ("float32", [*shape, info.num_classes])
        return {
            "input": {"name": "image", "dtype": "uint8", "shape": [*shape, 3], "channels": "RGB"},
            "output": {"name": self.outputs, "dtype": output[0], "shape": output[1]},
            "classes": info.class_names,
            "colors": info.colors,
        }


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format and what it can hold."""

    ending: str  # of the file's name; "" for a directory
    any_batch: bool  # whether the number of images can be left open
    any_size: bool  # whether their size can be left open


FORMATS = {  # each is written by the module of this name
    "stablehlo": Format(".stablehlo", any_batch=True, any_size=True),
    "savedmodel": Format("", any_batch=True, any_size=True),
    "onnx": Format(".onnx", any_batch=True, any_size=False),
    "tflite": Format(".tflite", any_batch=False, any_size=False),
}


def check(fmt: str, path: epath.Path, batch: int, size: tuple[int, int] | None) -> None:
    """Checks what `export` needs, as far as it is known without the network; a size of None is not known yet.

    Raises:
      UserError: the format cannot hold such a program, the path has another ending, PATH or PATH.json exists, or a directory
        is to be written into a bucket.
    """
    kind = FORMATS[fmt]
    if kind.ending and path.suffix != kind.ending:
        raise UserError(f"--output {path}: expected a name that ends in {kind.ending}, for --format {fmt}")
    with files.writing(path, "nothing was exported"):
        if not kind.ending:
            files.require_new_folder(path)
        for existing in filter(files.is_there, (path, _description(path))):
            raise UserError(f"{existing}: already exists; choose another --output, or delete it")
    if not batch and not kind.any_batch:
        raise UserError(f"--batch 0: {fmt} files hold a fixed number of images (see README.md); set --batch 1 or more")
    if size == ANY_SIZE and not kind.any_size:
        raise UserError(f"--size any: {fmt} files have a fixed image size (see README.md); set it, such as --size 473x473")
    if size and size != ANY_SIZE and min(size) < SMALLEST:
        raise UserError(f"--size {size[0]}x{size[1]}: expected at least {SMALLEST} pixels in height and width")


def export(program: Program, fmt: str, path: epath.Path) -> None:
    """Writes a program in one of `FORMATS`, and beside it PATH.json with its input, output and classes.

    Raises:
      UserError: as `check`; or the weights are not finite, a package is missing or the path cannot be written.
    """
    check(fmt, path, program.batch, program.size)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(program.variables)):
        raise UserError(f"{path}: the run's weights contain values that are not finite, so they were not exported")
    write: Callable[[Program, epath.Path], None] = importlib.import_module(f"pspnet_jax.deploy.{fmt}").write
    # The description gets its name last, and nothing but that can still fail once the program is there.
    with files.writing(path, "nothing was exported"), files.atomic(_description(path)) as temporary:
        temporary.write_text(json.dumps(program.describe(), indent=1) + "\n")
        write(program, path)


def _description(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.json")
