"""StableHLO, by `jax.export`: one file for CPUs, CUDA GPUs and TPUs, which JAX alone can load.

Code for a platform (see `models.layers.convolve`) is chosen when the program is loaded there.
"""

import jax
import jax.export
from etils import epath

from pspnet_jax import files
from pspnet_jax.deploy.export import PLATFORMS, Program


def write(program: Program, path: epath.Path) -> None:
    """Writes the program for `jax.export.deserialize(path.read_bytes()).call(images)`."""
    exported = jax.export.export(jax.jit(program.__call__), platforms=PLATFORMS)(program.images)
    with files.atomic(path) as temporary:
        temporary.write_bytes(exported.serialize())
