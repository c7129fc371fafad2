"""TensorFlow Lite (LiteRT), by TensorFlow's converter from a SavedModel.

The converter takes sizes that are left open for 1 and writes a file that computes something else, without a message
(TensorFlow 2.21). So the number and the size of images are fixed.
"""

import pathlib
import tempfile

from etils import epath

from pspnet_jax import files
from pspnet_jax.deploy import savedmodel
from pspnet_jax.deploy.export import Program
from pspnet_jax.errors import UserError, first_line
from pspnet_jax.models import layers


def write(program: Program, path: epath.Path) -> None:
    """Writes a file for `Interpreter(path).get_signature_runner()(image=images)`.

    Raises:
      UserError: TensorFlow is missing, or its converter refuses the network.
    """
    tf = savedmodel.import_tensorflow()
    with tempfile.TemporaryDirectory() as folder:
        with layers.plain():
            savedmodel.save(program.in_float32(), pathlib.Path(folder))
        try:
            content = tf.lite.TFLiteConverter.from_saved_model(folder).convert()
        except Exception as error:
            raise UserError(f"TensorFlow's converter to TFLite refuses this network: {first_line(error)}") from error
    with files.atomic(path) as temporary:
        temporary.write_bytes(content)
