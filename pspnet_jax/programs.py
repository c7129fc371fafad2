"""Compiled programs: the options that they are compiled with, and the directory that keeps them for later runs."""

import contextlib
import functools
import glob
import importlib.util
import os
import pathlib
import warnings
import zlib

import jax
from jax.sharding import Mesh

from pspnet_jax import files

ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")  # device files: TPUs, then GPUs
ONEDNN = "xla_cpu_experimental_onednn_custom_call"


def options(dtype: str, mesh: Mesh) -> dict[str, bool] | None:
    """Returns the `compiler_options` of jax.jit for inference with a network that computes in `dtype` on the mesh's devices.

    On CPUs that have bfloat16 products, oneDNN makes inference in bfloat16 faster (see benchmarks/model.md). It is not used
    where XLA_FLAGS chooses, or where it was not measured: before JAX 0.11 and on other CPUs. In float32 it gains nothing, and
    costs something: XLA cannot serialize programs with oneDNN, so they are compiled anew in each run. Nor is it used in
    training, where XLA has been seen to compile loops with it without end.
    """
    if dtype != "bfloat16" or mesh.devices.flat[0].platform != "cpu" or ONEDNN in os.environ.get("XLA_FLAGS", ""):
        return None
    if jax.__version_info__ < (0, 11) or "avx512_bf16" not in cpu_features().split():
        return None
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry .* MemoryError: std::bad_alloc")
    return {ONEDNN: True}


def skip_tpu_compiler() -> None:
    """Makes JAX use only the CPU where the TPU compiler is installed, but there is neither a TPU nor a GPU.

    JAX would load it, and with it, prints complaints and crashes in its profiler. Called before JAX starts; if JAX_PLATFORMS is
    set, it prevails.
    """
    only_cpu = importlib.util.find_spec("libtpu") and not any(map(glob.glob, ACCELERATORS))
    if only_cpu and not jax.config.jax_platforms:  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")


def keep() -> None:
    """Makes JAX keep compiled programs for later runs, unless the user has chosen a directory for them.

    Programs for a CPU can use all its instructions, so each kind of CPU has a directory of its own. Nothing is kept where the
    user's cache cannot be written, as in some containers.
    """
    if jax.config.jax_compilation_cache_dir or not (features := cpu_features()):  # type: ignore[attr-defined]
        return
    programs = files.user_cache() / f"{zlib.crc32(features.encode()):08x}"
    if not programs.is_absolute():  # no home directory is known
        return
    with contextlib.suppress(OSError):
        programs.mkdir(parents=True, exist_ok=True)
    if not (programs.is_dir() and os.access(programs, os.W_OK)):
        return
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_compilation_cache_max_size", 2**32)  # 4 GiB; beyond it, the programs used least recently are removed
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a folder of many sizes has many small programs


@functools.cache
def cpu_features() -> str:
    """Returns the instruction sets of this machine's CPU as Linux lists them; empty elsewhere."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
