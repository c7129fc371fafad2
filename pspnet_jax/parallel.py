"""Devices: the mesh, the shardings, and the way from a host's numpy batch to global arrays.

Programs are written as if for one device and compiled for the mesh; its axes are "data", over which the batch is shared
out, and "spatial", over which one image may be (of size 1).
"""

import collections
import contextlib
import logging
import os
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pspnet_jax.errors import UserError

logger = logging.getLogger(__name__)


def start_processes() -> None:
    """Joins the processes of one job: on a TPU pod, under SLURM or Open MPI, or as three variables of the environment say.

    These are JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID; JAX itself
    reads only the first. Where the other processes do not come, JAX ends this one after five minutes.

    Raises:
      UserError: no cluster was recognized, or JAX has been used already.
    """
    logger.info("waiting for the other processes of this job; the same command has to be started on every host")
    try:
        number, own = (
            int(value) if (value := os.environ.get(f"JAX_{name}")) else None for name in ("NUM_PROCESSES", "PROCESS_ID")
        )
        jax.distributed.initialize(num_processes=number, process_id=own)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--distributed: the processes of this job could not be joined ({error}); start the same command on every host "
            "of the pod or cluster at the same time, as the scripts in launch/ do, or leave --distributed out on one machine"
        ) from error


def agree(number: int) -> int:
    """The largest of the numbers that the processes of this job give; all of them have to call it."""
    return int(multihost_utils.process_allgather(np.int32(number)).max()) if jax.process_count() > 1 else number


def require_same(what: str, value: object) -> None:
    """Refuses to go on where the processes of this job have different values, such as settings.

    Raises:
      UserError: says what differs.
    """
    digest = zlib.crc32(repr(value).encode()) >> 1  # 31 bits
    if agree(digest) != -agree(-digest):
        raise UserError(f"the processes of this job differ in {what}; start all of them alike, on the same files")


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Lets all processes of this job fail in the block where one of them does, so that none waits for it afterwards.

    Raises:
      UserError: it failed in another process.
    """
    try:
        yield
    except Exception:
        agree(1)
        raise
    if agree(0):
        raise UserError(f"{what} failed in another process of this job, which says why")


def make_mesh(devices: Iterable[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ("data", "spatial") over the devices given, or over all devices of the job.

    In the order of processes, so that an example's place in the batch does not depend on how the devices are wired.
    """
    ordered = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(-1, 1), ("data", "spatial"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [N, ...]: each device has N / devices of the examples."""
    return NamedSharding(mesh, PartitionSpec("data"))


def to_devices(batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh, ahead: int = 2) -> Generator[dict[str, jax.Array]]:
    """Turns this process's batches into global ones, in a thread that is `ahead` of their use.

    So copying overlaps with computing, and a batch that is there is handed out though the next one may be late.
    """
    sharding, iterator = batch_sharding(mesh), iter(batches)

    def put_next() -> dict[str, jax.Array] | None:
        if (batch := next(iterator, None)) is None:
            return None
        return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}

    with ThreadPoolExecutor(1, "to devices") as thread:
        futures = collections.deque(thread.submit(put_next) for _ in range(ahead + 1))
        try:
            while (batch := futures.popleft().result()) is not None:
                futures.append(thread.submit(put_next))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)
