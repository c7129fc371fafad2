"""TensorFlow's SavedModel, by jax2tf: the same StableHLO as in `stablehlo`, in one operation of TensorFlow."""

import pathlib
from types import ModuleType

from etils import epath

from pspnet_jax import files
from pspnet_jax.deploy.export import PLATFORMS, Program
from pspnet_jax.errors import UserError


def write(program: Program, path: epath.Path) -> None:
    """Writes a directory for `tf.saved_model.load(path).signatures["serving_default"](image=images)`."""
    with files.new_folder(path) as temporary:
        save(program, temporary)


def save(program: Program, folder: pathlib.Path) -> None:
    """Writes a SavedModel into a local folder."""
    tf = import_tensorflow()
    from jax.experimental import jax2tf

    convert = jax2tf.convert(
        lambda image: {program.outputs: program(image)},
        polymorphic_shapes=[program.polymorphic_shape],
        polymorphic_constraints=program.constraints,
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )
    shape = [size if isinstance(size, int) else None for size in program.images.shape]
    module = tf.Module()
    module.segment = tf.function(convert, autograph=False, input_signature=[tf.TensorSpec(shape, tf.uint8, "image")])
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.segment})


def import_tensorflow() -> ModuleType:
    """Returns TensorFlow.

    Raises:
      UserError: it is not installed.
    """
    try:
        import tensorflow as tf

        import pspnet_jax.data  # noqa: F401 -- hides TensorFlow's messages and leaves GPUs to JAX
    except ImportError as error:
        raise UserError("--format savedmodel and tflite need TensorFlow: pip install 'pspnet_jax[train]'") from error
    return tf
