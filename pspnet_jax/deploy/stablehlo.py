"""StableHLO, by `jax.export`: one file for CPUs, CUDA GPUs and TPUs, which JAX can load; both need the package flatbuffers.

Code for a platform (see `models.layers.convolve`) is chosen when the program is loaded there.
"""

import jax
import jax.export
from etils import epath

from pspnet_jax import files
from pspnet_jax.deploy.export import PLATFORMS, Program
from pspnet_jax.errors import UserError


def write(program: Program, path: epath.Path) -> None:
    """Writes the program for `jax.export.deserialize(path.read_bytes()).call(images)`.

    Raises:
      UserError: the package flatbuffers is missing.
    """
    exported = jax.export.export(jax.jit(program.__call__), platforms=PLATFORMS)(program.images)
    try:
        content = exported.serialize()
    except ImportError as error:
        raise UserError("--format stablehlo needs the package flatbuffers: pip install 'pspnet_jax[export]'") from error
    with files.atomic(path) as temporary:
        temporary.write_bytes(content)
