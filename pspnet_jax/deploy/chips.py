"""TPU generations and the topologies in which they are rented."""

import math
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies
from rich.table import Column, Table

from pspnet_jax.errors import UserError, first_line


class Chip(NamedTuple):
    """A TPU generation."""

    hbm: float  # main memory of a chip that programs can use, in bytes; a little less than its nominal size
    bandwidth: float  # of the main memory, in bytes/s
    flops: float  # peak FLOP/s in bfloat16
    cloud: str  # name of an accelerator type on Google Cloud, with the number of chips or, before v5e, of TensorCores
    topologies: tuple[str, ...]  # those that can be compiled for here

    def cloud_name(self, topology: str) -> str:
        return self.cloud.format(chips(topology), 2 * chips(topology))


SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {  # docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, read in 2026; memory: as the compiler reports it
    "v4": Chip(30.75 * 2**30, 1228e9, 275e12, "v4-{1}", CUBES),
    "v5e": Chip(15.75 * 2**30, 819e9, 197e12, "v5litepod-{0}", SQUARES),
    "v5p": Chip(94.75 * 2**30, 2765e9, 459e12, "v5p-{1}", CUBES),
    "v6e": Chip(31.25 * 2**30, 1640e9, 918e12, "v6e-{0}", SQUARES),
}


def chips(topology: str) -> int:
    """Returns the number of chips of a topology such as "4x4" or "2x2x4"."""
    return math.prod(map(int, topology.split("x")))


def table() -> Table:
    """Returns a rich table of all topologies."""
    columns = (Column(name, justify="right") for name in ("chips", "HBM of a chip, GiB", "GB/s", "TFLOP/s (bfloat16)"))
    found = Table("topology", "on Google Cloud", *columns, caption="peaks from docs.cloud.google.com/tpu/docs/GENERATION")
    for generation, chip in CHIPS.items():
        for topology in chip.topologies:
            figures = chip.hbm / 2**30, chip.bandwidth / 1e9, chip.flops / 1e12
            found.add_row(
                f"{generation}:{topology}", chip.cloud_name(topology), str(chips(topology)), *(f"{f:g}" for f in figures)
            )
    return found


def parse(names: str) -> list[tuple[str, str]]:
    """Returns (generation, topology) pairs, such as ("v5e", "4x4"), from names like "v5e:4x4,v6e:16x16".

    Raises:
      UserError: lists the choices.
    """
    pairs = []
    for name in names.split(","):
        generation, _, topology = name.strip().partition(":")
        if generation not in CHIPS or topology not in CHIPS[generation].topologies:
            raise UserError(f"--topology: {name.strip()!r} is unknown; --topology list shows all, such as v5e:4x4")
        pairs.append((generation, topology))
    return pairs


def devices(generation: str, topology: str) -> list[jax.Device]:
    """Returns the devices of a topology, for which programs can be compiled but not run.

    Raises:
      UserError: the TPU compiler is not installed.
    """
    # Otherwise libtpu cannot be loaded while another process uses it, such as a job on the TPU of this machine. It also asks
    # Google Cloud's metadata server what machine this is, and complains where there is none.
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(topology_name=f"{generation}:{topology}", platform="tpu").devices
    except (RuntimeError, ImportError) as error:
        raise UserError(
            f"the TPU compiler cannot compile for {generation}:{topology} here ({first_line(error)}); it comes with "
            'libtpu: pip install "pspnet_jax[tpu]"'
        ) from error
